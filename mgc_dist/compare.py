"""`python -m mgc_dist.compare RUN_A RUN_B`, or many runs: which is better, and how sure is it?"""

from mgc_dist import cli
from mgc_dist.config import CompareConfig


def run(config: CompareConfig) -> None:
    """Compare runs from their predictions; print, and write comparison.json and .png.

    Raises:
        UserError: a run was not evaluated, or the runs were not measured on the same tracks.
    """
    # here, not above: they import scipy and matplotlib, and --help answers without
    from mgc_dist.report import exam_report, tables
    from mgc_dist.report.comparison import compare

    found = compare(config)
    (tables.pair if found.is_pair else tables.seeds)(found.figures)
    exam_report.show_beside(exam_report.beside(config.runs, config.result_name))
    print(f"written: {found.folder}/comparison.json, comparison.png")
    if found.is_pair and config.out is None and (config.runs[1] / "report.html").is_file():
        from mgc_dist.report import page  # it imports torch, for the audio of mistakes

        page.attempt(config.runs[1])


def main() -> None:
    """Entry of `python -m mgc_dist.compare`."""
    cli.main("compare", CompareConfig, run)


if __name__ == "__main__":
    main()
