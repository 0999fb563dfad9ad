"""From a task's rows to batches of tokens, in an order that depends on (seed, epoch) only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from .base import Task
    from .likelihoods import Collate, Rows

_POOL = 50  # batches that are sorted by length together, or a quarter of the epoch's, as in transformers' Trainer


def tokenize(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int
) -> datasets.Dataset:
    """Token ids and labels, as the task's kind of outcome has them (`Likelihood.encode`)."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    columns, kind = list(task.text_columns), task.likelihood

    def encode(batch: Rows) -> Rows:
        return kind.encode(tokenizer, batch, task.text_columns, max_length)

    kept, bars = rows.select_columns([*columns, "label"]), is_progress_bar_enabled()
    disable_progress_bar()
    try:
        # no cache asks for its fingerprint, for which a tokenizer of 128,000 words would be pickled: a second
        return kept.map(encode, batched=True, remove_columns=columns, keep_in_memory=True, new_fingerprint="tokens")
    finally:
        if bars:
            enable_progress_bar()


def cut_short(
    rows: datasets.Dataset, tokens: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int
) -> int:
    """How many of the rows had more tokens than max_length, so that their ends are not read."""
    full = [row for row, length in enumerate(lengths_of(tokens)) if length >= max_length]
    longer = tokenize(rows.select(full), tokenizer, task, max_length + 1) if full else tokens.select(())
    return sum(length > max_length for length in lengths_of(longer))


def take(rows: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """`count` rows drawn without replacement, or all of them."""
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return rows.select(sorted(order.tolist()))


def held_out(rows: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(the rest, a fraction of the rows), drawn without replacement; the same for a seed.

    Errors: ValueError where one of them would be empty.
    """
    count = round(fraction * len(rows))
    if not 0 < count < len(rows):
        raise ValueError(
            f"validation {fraction:g} of {len(rows)} training rows leaves {len(rows) - count} to train on and {count} "
            "to validate on: change --validation, or raise --max_train"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def unlabelled(rows: datasets.Dataset, columns: tuple[str, ...]) -> datasets.Dataset:
    """The texts alone, labelled 0: what is asked about them is not their label."""
    return rows.select_columns(list(columns)).add_column("label", [0] * len(rows))


def epoch_order(
    rows: int, batch_size: int, accumulation: int, seed: int, epoch: int, lengths: list[int] | None = None
) -> list[list[int]]:
    """Shuffled batches of one epoch, all of the same size, as many as fill whole optimizer steps.

    lengths: of the rows; where given, a batch has rows of similar length.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    count = rows // (batch_size * accumulation) * accumulation
    order = torch.randperm(rows, generator=generator).tolist()[: count * batch_size]
    if lengths is not None:
        pool = batch_size * max(1, min(_POOL, count // 4))
        pools = (order[i : i + pool] for i in range(0, len(order), pool))
        order = [i for pool in pools for i in sorted(pool, key=lengths.__getitem__)]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches if lengths is None else [batches[i] for i in torch.randperm(count, generator=generator).tolist()]


def loader(rows: datasets.Dataset, collate: Collate, batches: list[list[int]]) -> DataLoader[Any]:
    """collate: of the task's kind of outcome, `Likelihood.collator(tokenizer)`."""
    # pinned memory is copied to a GPU while the host goes on
    return DataLoader(rows, batch_sampler=batches, collate_fn=collate, pin_memory=torch.cuda.is_available())


def first_inputs(rows: datasets.Dataset, collate: Collate, count: int = 4) -> dict[str, torch.Tensor]:
    """What the backbone takes of the first rows, as one batch."""
    batch = next(iter(loader(rows, collate, [[*range(min(count, len(rows)))]])))
    return split_labels(batch, torch.device("cpu"))[0]


def by_length(rows: datasets.Dataset, collate: Collate, batch_size: int) -> tuple[DataLoader[Any], torch.Tensor]:
    """Every row once, long ones first so that little is padded, for evaluation; and the rows' numbers in that order."""
    batches = batches_by_length(rows, batch_size)
    return loader(rows, collate, batches), torch.tensor([i for batch in batches for i in batch])


def lengths_of(rows: datasets.Dataset | Rows) -> list[int]:
    """Tokens of each row; of its longest part, where it has several."""
    return [max(map(len, row)) if row and isinstance(row[0], list) else len(row) for row in rows["input_ids"]]


def batches_by_length(rows: datasets.Dataset, batch_size: int) -> list[list[int]]:
    """The numbers of all rows, long ones first, in batches."""
    return longest_first(lengths_of(rows), batch_size)


def longest_first(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The numbers of rows of these lengths, long ones first, in batches."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def split_labels(
    batch: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what the backbone takes, labels (B, *)), on a device."""
    inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return inputs, inputs.pop("labels")


def on_device(batches: DataLoader[Any], device: torch.device) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    for batch in batches:
        yield split_labels(batch, device)
