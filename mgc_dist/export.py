"""`python -m mgc_dist.export RUN OUT`: the best model as a Hugging Face folder."""

from mgc_dist import cli
from mgc_dist.config import ExportConfig


def run(config: ExportConfig) -> None:
    """Export the best model, and leave this process as it was found; for the rest see `_run`."""
    from mgc_dist import guest  # it imports torch

    with guest.as_found():
        _run(config)


def _run(config: ExportConfig) -> None:
    """Copy the best model, with a card that says what it was trained on.

    Raises:
        UserError: no best model in the run, one that transformers cannot load, or a folder with
            files in the way.
    """
    # here, not above: it imports torch, which takes seconds, and --help answers without
    from mgc_dist.models.export import export

    found = export(
        config.run, config.out, ema=config.ema, trust_remote_code=config.trust_remote_code
    )
    trust = ", trust_remote_code=True" if found.has_code else ""
    print(
        f"Wrote {found.folder}; load it with "
        f'transformers.pipeline("audio-classification", model="{found.folder}"{trust})'
    )
    if found.has_code:
        print(
            "The folder holds code that runs then: that of the model, or pooling.py for its head."
        )


def main() -> None:
    """Entry of `python -m mgc_dist.export`."""
    cli.main("export", ExportConfig, _run)


if __name__ == "__main__":
    main()
