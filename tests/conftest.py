"""Each test's name finishes the sentence "plainllama promises that …"."""

import atexit
import dataclasses
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("PLAINLLAMA_TEST_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT))
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower with more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what a test trains is known on this machine only to the tests
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="plainllama_tests_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes or needs a quiet machine; runs with --slow")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "test_every_command" not in item.name)  # the longest first, lest one ends alone
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


@pytest.fixture(scope="session")
def shared():
    """A function from the name of a test file to its path; the test is skipped where the file is not there."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not in PLAINLLAMA_TEST_DATA ({SHARED})")
        return SHARED / name

    return find


TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 8,
    "def add(a, b):\n    return a + b\n" * 9,
    "Ein Jäger aus Kurpfalz.\n" * 9,
]


def byte_data(folder: Path, num_documents: int) -> Path:
    """A dataset folder of bytes: different short documents."""
    (folder / "texts").mkdir()
    for i in range(num_documents):
        (folder / "texts" / f"{i}.md").write_text(f"Document {i}.\n{TEXTS[i % 3]}")
    prepare((str(folder / "texts"),), folder / "data", "bytes", val_fraction=0.1, workers=1)
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    return byte_data(tmp_path_factory.mktemp("tiny"), 300)


def random_model(config, seed: int = 0):
    """A model whose weights are large enough that its logits differ clearly."""
    import torch

    from model import Transformer

    torch.manual_seed(seed)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.normal_(p, 1.0, 0.3)
    return model.eval()


def additions(config, num_tokens: int) -> int:
    """How many additions, one after the other, a logit after so many tokens has behind it."""
    attention = 3 * config.dim + config.head_dim + 2 * num_tokens  # softmax and values: 2 T
    return config.num_layers * (attention + 2 * config.dim + config.ffn_dim) + 2 * config.dim


def assert_same_but_for_rounding(mine, theirs, additions: int, size: float = 0.0):
    """The same numbers, computed in fp32 in two orders, so many additions in a row behind each.

    The largest difference is at most 8 · sqrt(additions) · 2^-24 of the largest number, on any
    processor with any number of threads: rounding errors grow with the root of their number
    (Higham and Mary 2019). Where the numbers are differences, size is that of what they are
    differences of.
    """
    import torch

    mine, theirs = (torch.as_tensor(numbers, dtype=torch.float64) for numbers in (mine, theirs))
    assert mine.shape == theirs.shape
    difference, bound = (mine - theirs).abs().max().item(), 8 * additions**0.5 * 2**-24
    size = max(size, theirs.abs().max().item())
    assert difference <= bound * size, f"{difference:.3g} is above {bound:.3g} of {size:.3g}"


def checkpoints_of(folder: Path, config, model, optimizers, guard, adapter=None):
    """What saves a run of this model."""
    from lib.saving import Checkpoints

    config, record = dataclasses.replace(config, out=str(folder)), {"adapter": adapter} if adapter else {}
    return Checkpoints(config, model, optimizers, guard, [1.0], record)


def forecast_of(shape, config, ranks: int, compiled: bool, pairs: bool = False) -> dict[str, int]:
    """The forecast of a run's memory, by what it is for."""
    import train
    from lib.forecast import forecast

    return forecast(train.empty_model(shape, config), config, ranks, compiled, pairs)


def prepare(
    source: tuple[str, ...], out: str | Path, tokenizer: str,
    val_fraction: float = 0.05, workers: int | None = None,
) -> dict:  # fmt: skip
    """Make a dataset of text, see data.make_dataset."""
    from data import Text, make_dataset
    from lib import sources

    config = sources.Flags(source, out, tokenizer, val_fraction, workers=workers or 0)
    return make_dataset(config, Text(config))


def prepare_chats(
    source: tuple[str, ...], out: str | Path, tokenizer: str, template: str,
    max_len: int = 2048, format: str = "auto", val_fraction: float = 0.05, allow_bad: float = 0.01,
    workers: int | None = None, cleaning=None,
) -> dict:  # fmt: skip
    """Make a fine-tuning set, or from pairs a preference set, see data.make_dataset."""
    from data import Config, make_dataset
    from lib.chat_source import Chats, Cleaning

    plain = dict(source=source, out=out, tokenizer=tokenizer, val_fraction=val_fraction, workers=workers or 0)
    chat = dict(template=template, max_len=max_len, format=format, allow_bad=allow_bad)
    config = Config(**plain, **chat, cleaning=cleaning or Cleaning())
    return make_dataset(config, Chats(config))


TINY_RUN = dict(
    size="260K", dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, seq_len=32, batch_size=4,
    eval_tokens=512, log_every=1, eval_every=10, save_every=100, learning_rate=1e-2, dtype="fp32", sample="",
)  # fmt: skip


@pytest.fixture
def tiny_run(tiny_data, tmp_path, monkeypatch):
    """A function that trains a tiny model in this process and returns the run's folder; flags change the defaults."""
    import train
    from lib.defaults import by_kind

    monkeypatch.chdir(tmp_path)

    def run(out: str = "run", **flags) -> Path:
        if "resume" in flags:
            flags |= {"data": (flags["data"],)} if "data" in flags else {}
            config = dataclasses.replace(by_kind(train.Config(resume=flags["resume"])), **flags)
        else:
            shape = dict.fromkeys(("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"), 0)
            shape |= {"size": train.Config.size}
            options = TINY_RUN | (shape if "init_from" in flags else {}) | {"data": str(tiny_data), "out": out} | flags
            sources = options["data"]
            options["data"] = (sources,) if isinstance(sources, str) else sources
            config = train.Config(**options)
        train.main(config)
        return tmp_path / config.out

    return run


def flags(options: dict) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def command(*words: str, cwd=None, env: dict | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """Run one of the project's scripts in a process of its own.

    It is forked from one that has imported what takes seconds; with an env of its own it starts from nothing, since
    some variables count when a library is loaded.
    """
    words = [str(ROOT / words[0]), *words[1:]]
    if env is not None:
        env = os.environ | env
        done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)
    else:
        done = forked(words, cwd or os.getcwd())
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def forked(words: list[str], cwd) -> subprocess.CompletedProcess:
    """Run a script as __main__ in a process that starts at once."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = forkserver().Process(target=_script, args=(words, cwd, outputs, dict(os.environ)))
        process.start()
        process.join()
        texts = [path.read_bytes().decode() for path in outputs]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _script(words: list[str], cwd, outputs: list[Path], env: dict):
    for number, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = words
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def forkserver():
    """Processes of this context have imported the project."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "eval"])
    return context


@pytest.fixture
def one_thread():
    """This process takes one thread, as those of run_ranks do: then they agree to the last bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start_ranks(world: int, function, *args) -> list[multiprocessing.Process]:
    """Begin function(*args) in `world` processes that find each other as under torchrun, but start in a second."""
    context = forkserver()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, world, port, function, args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, world: int, port: int, function, args):
    import torch

    from lib.world import leave

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*args)
    leave()


def run_ranks(world: int, function, *args):
    for process in start_ranks(world, function, *args):
        process.join(300)
        assert process.exitcode == 0


def torchrun(num_processes: int, script: str, *words: str, cwd=None) -> subprocess.CompletedProcess:
    """Run a script under torchrun on the CPU, one thread a process."""
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_processes),
        str(ROOT / script),
        *words,
    ]
    done = subprocess.run(words, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
