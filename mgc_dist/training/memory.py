"""What it means that memory is short: which flag asks for too much."""

from mgc_dist.config import TrainConfig
from mgc_dist.errors import UserError
from mgc_dist.training.setup import Run

_SHORT = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""In the words of CUDA and torch, of torch on a CPU, and of cuBLAS and cuDNN."""


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory was short, on a GPU or on the host."""
    short = isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)
    return short or isinstance(error, MemoryError)


def too_large(run: Run, error: BaseException) -> UserError:
    """Which batch is too large: validation's, or that of training and of the cache."""
    engine, makes_cache = run.config.engine, run.cached is not None and not run.features
    if run.model.training or makes_cache:
        batch = f"--micro-batch {engine.micro_batch}"
        cure = "lower it: --global-batch stays as it is; or --activation-checkpointing"
    else:
        batch = f"--eval-batch {engine.eval_batch}"
        cure = "lower it: figures stay the same but for rounding; --resume auto goes on"
    return UserError(
        batch,
        got=_said(error),
        expected="a batch that fits the memory of a rank",
        cure=cure,
        this_rank_only=True,
    )


def no_room(config: TrainConfig, error: BaseException) -> UserError:
    """The weights and the optimizer alone are too large."""
    return UserError(
        f"--model {config.main.model} at --zero-stage {config.engine.zero_stage}",
        got=_said(error),
        expected="weights and optimizer that fit the memory of a rank",
        cure="look at --dry-run; freeze more, or spread them: --zero-stage 2 or 3 on more ranks",
        this_rank_only=True,
    )


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
