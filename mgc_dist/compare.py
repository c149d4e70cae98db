"""`python -m mgc_dist.compare RUN_A RUN_B`, or many runs: which is better, and how sure is it?"""

from mgc_dist import cli
from mgc_dist.config import CompareConfig


def run(config: CompareConfig) -> None:
    """Compare runs from their predictions; print, and write comparison.json and .png.

    Raises:
        UserError: a run was not evaluated, or the runs were not measured on the same tracks.
    """
    import json

    from mgc_dist.files import replace_text
    from mgc_dist.report import comparison, tables
    from mgc_dist.scoring import conditions, paired, results

    found = [results.read(run, config.result_name) for run in config.runs]
    picture = config.folder / "comparison.png"
    if len(found) == 2:
        report = paired.compare(
            found[0], found[1], config.result_name, resamples=config.resamples, seed=config.seed
        )
        comparison.draw_pair(picture, report)
        tables.pair(report)
    else:
        runs = []
        for result in found:
            seed, settings = conditions.settings_of(result.run)
            runs.append(conditions.Run(result=result, seed=seed, settings=settings))
        report = conditions.compare(runs, config.result_name)
        comparison.draw_seeds(picture, report)
        tables.seeds(report)
    config.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    replace_text(config.folder / "comparison.json", text)
    print(f"written: {config.folder}/comparison.json, comparison.png")


def main() -> None:
    """Entry of `python -m mgc_dist.compare`."""
    cli.main("compare", CompareConfig, run)


if __name__ == "__main__":
    main()
