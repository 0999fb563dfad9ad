"""Names on the hub: `user/name` to a folder in huggingface_hub's cache, of safetensors, JSON and the like alone."""

from __future__ import annotations

import re
from pathlib import Path

from ..files import SUMS

PATTERNS = (  # no pickle, no code
    "*.safetensors", "*.json", "*.onnx", "*.txt", "*.model", "bpe.codes", "*.jinja", "*.md", SUMS,
)  # fmt: skip
"""Files that are sent and fetched: weights, descriptions, vocabularies, templates of a chat, cards, hashes."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: str | Path) -> bool:
    """Whether a name is one of the hub's, and not that of a folder here: `runs/typo` is not, where `runs` is."""
    return isinstance(name, str) and bool(HUB_NAME.fullmatch(name)) and not Path(name).parent.exists()


def folder_of(name: str | Path, revision: str | None = None) -> Path:
    """The folder of that path, or of that name on the hub, which is fetched where it is not in the cache.

    Errors: ValueError for a revision of a folder, and for a name that the hub does not have or cannot be asked for.
    """
    if not is_hub_name(name):
        if revision is not None:
            raise ValueError(f"{name} is a folder, and a revision is of a name on the hub: drop the revision")
        return Path(name).expanduser()
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"{name} at revision {revision}" if revision else str(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(PATTERNS)))
    except RepositoryNotFoundError:
        raise ValueError(
            f"there is no folder {name} here, and no such model on the hub, or a private one: check the name, or log "
            "in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} on the hub has no revision {revision}: give a branch, a tag or a commit") from None
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set: unset it" if constants.is_offline_mode() else "the hub is not reached"
        raise ValueError(
            f"there is no folder {name} here, and {at} is not in the cache of the hub; {offline}, or give a folder"
        ) from None
    except Exception as error:  # of HTTP, in any of its libraries
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{at} could not be fetched from the hub: {said}") from None
