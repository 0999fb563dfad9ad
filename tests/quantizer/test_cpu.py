"""The compiled loops against the eager functions: values to the bit, sums near exact ones, the same on any threads."""

import logging
import math
import os
import shutil

import pytest
import torch
from forked import started

from pyro_blora.quantizer import cpu, fake_quantize, grids, mixture_weights, quantize

CHAINS = ((1, 0.9, 0.7, 0.2, 0.1), (1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, 1, 0), (1, 1, 1, 1, 1))


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        cpu.loops()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process."""
    caches = fake_quantize._kernels, cpu.loops
    monkeypatch.setenv("PYRO_BLORA_COMPILE", "1")
    for each in caches:
        each.cache_clear()
    yield monkeypatch
    for each in caches:
        each.cache_clear()


def constants(chain, value_range=2.5):
    return grids(torch.tensor(value_range), mixture_weights(torch.tensor(chain, dtype=torch.float32)))[0].constants


@pytest.mark.parametrize("n", [0, 1, 7, 4096, 5 * 4096 + 3, 40000])
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_grad", [torch.float32, torch.bfloat16])
def test_values_are_the_eager_ones_and_sums_are_near_exact_ones(n, of_x, of_grad):
    torch.manual_seed(n)
    x, grad = (2 * torch.randn(n)).to(of_x), torch.randn(n).to(of_grad)
    for chain in CHAINS:
        c = constants(chain)
        assert torch.equal(cpu.forward(x, c), fake_quantize._forward(x, c))
        slope, sums = cpu.backward(grad, x, c)
        assert slope.dtype == of_x and torch.equal(slope, fake_quantize._backward(grad, x, c)[0])
        assert torch.equal(sums, cpu.backward_of_gates(grad, x, c))
        exact = fake_quantize._backward_of_gates(grad.double(), x.double(), c.double()).float()
        torch.testing.assert_close(sums, exact, rtol=1e-4, atol=1e-5 * max(1, n) ** 0.5)


def test_what_is_not_finite_stays_so():
    x, c = torch.tensor([math.nan, math.inf, -math.inf, 3e38, 1e-40, -0.0]), constants(CHAINS[0])
    for kind in (torch.float32, torch.bfloat16):
        given = x.to(kind)
        torch.testing.assert_close(
            cpu.forward(given, c), fake_quantize._forward(given, c), equal_nan=True, rtol=0, atol=0
        )
        slope = cpu.backward(given, given, c)[0]
        torch.testing.assert_close(slope, fake_quantize._backward(given, given, c)[0], equal_nan=True, rtol=0, atol=0)


def test_any_number_of_threads_gives_the_same_bits():
    x, grad, c = torch.randn(300_000), torch.randn(300_000), constants(CHAINS[0])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((cpu.forward(x, c), *cpu.backward(grad, x, c)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_tensors_without_values_and_other_precisions_go_to_the_eager_functions():
    c = constants(CHAINS[0])
    for x in (torch.ones(3, device="meta"), torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.float64)):
        assert fake_quantize.kernels(x, c.to(x.device)) is fake_quantize._EAGER
    assert fake_quantize.kernels(torch.ones(3), c.double()) is fake_quantize._EAGER


def test_without_a_compiler_it_runs_eagerly_and_says_so(fresh, caplog, tmp_path):
    fresh.setenv("PYRO_BLORA_CACHE", str(tmp_path))
    fresh.setattr(cpu, "_COMPILERS", ("no-such-compiler",))
    fresh.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert quantize(torch.ones(3), torch.tensor(1.5), torch.tensor([1.0, 0, 0, 0, 0])).tolist() == [1, 1, 1]
    assert [message for message in caplog.messages if "no-such-compiler" in message] == [caplog.messages[-1]]
    assert not list(tmp_path.rglob("*.so"))


def test_loops_that_compute_something_else_are_not_used(fresh, caplog):
    forward, *others = cpu.KERNELS
    fresh.setattr(cpu, "KERNELS", (lambda x, c: forward(x, c) + 1e-6, *others))
    with caplog.at_level(logging.WARNING):
        assert fake_quantize._kernels() is fake_quantize._EAGER
    assert "something else" in caplog.text


@pytest.mark.parametrize("cache", ["a file", "damaged"])
def test_a_cache_that_is_of_no_use_costs_a_compilation(fresh, tmp_path, cache):
    fresh.setenv("PYRO_BLORA_CACHE", str(tmp_path / "cache"))
    if cache == "a file":
        (tmp_path / "cache").write_text("no folder")
    else:
        cpu.loops()
        (path,) = (tmp_path / "cache" / "quantizer").glob("*.so")
        path.unlink()  # what is loaded already stays as it is
        path.write_bytes(b"\x7fELF, cut off")
        cpu.loops.cache_clear()
    x, c = torch.randn(50), constants(CHAINS[0])
    assert torch.equal(cpu.forward(x, c), fake_quantize._forward(x, c))


def test_a_second_process_finds_what_the_first_one_made(fresh, tmp_path):
    fresh.setenv("PYRO_BLORA_CACHE", str(tmp_path))

    def load_in_a_process():
        process = started(lambda: cpu.loops() and None, tmp_path / "printed.txt")
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code == 0, (tmp_path / "printed.txt").read_text("utf-8")

    load_in_a_process()
    (made,) = (tmp_path / "quantizer").iterdir()
    when = made.stat().st_mtime_ns
    load_in_a_process()
    assert [path.stat().st_mtime_ns for path in (tmp_path / "quantizer").iterdir()] == [when]


def test_a_gradient_of_another_precision_than_is_compiled_is_taken():
    x, c = torch.randn(100), constants(CHAINS[0])
    slope, sums = cpu.backward(torch.ones(100, dtype=torch.float16), x, c)
    expected = cpu.backward(torch.ones(100), x, c)
    assert torch.equal(slope, expected[0]) and torch.equal(sums, expected[1])


@pytest.mark.parametrize("named", ["{cc} -g0", "no-such-compiler", ""])
def test_a_compiler_by_another_name(fresh, tmp_path, named):
    fresh.setenv("PYRO_BLORA_CACHE", str(tmp_path))
    fresh.setenv("CC", named.format(cc=shutil.which("cc") or "gcc"))
    assert fake_quantize._kernels() is cpu.KERNELS and len(list(tmp_path.rglob("*.so"))) == 1


def test_without_a_home_it_is_compiled_for_the_process(fresh):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("PYRO_BLORA_CACHE", "XDG_CACHE_HOME"):
        fresh.delenv(name, raising=False)
    fresh.setattr(cpu.Path, "home", none)
    assert fake_quantize._kernels() is cpu.KERNELS
