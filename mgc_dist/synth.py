"""`python -m mgc_dist.synth OUT`: a seeded synthetic data set in GTZAN's folder layout.

Ten genres that a small model learns in minutes on a CPU (`music`), or, with `--shortcut`, a set
with a planted shortcut and a second one in which the shortcut tells nothing (`planted`).
`artists.csv` names the artists, for `python -m mgc_dist.shard --groups`.
"""

from mgc_dist import cli
from mgc_dist.config import SynthConfig


def run(config: SynthConfig) -> None:
    """Write tracks, then the tables that describe them; files of the same names are replaced."""
    from mgc_dist.packing import synthesis  # here, not above: --help answers without numpy

    if not config.shortcut:
        made = synthesis.write_genres(config)
        table = config.out / "artists.csv"
        print(
            f"Wrote {made.tracks} tracks of {config.track_s:g} s and {table}; next: "
            f"python -m mgc_dist.shard --data {config.out / 'genres_original'} --groups {table}"
        )
        return
    made = synthesis.write_shortcut(config)
    print(f"Wrote {made.tracks} tracks of {config.track_s:g} s with a planted shortcut; next:")
    for home, name in zip(made.homes, ("shortcut", "shortcut-shifted"), strict=True):
        print(
            f"python -m mgc_dist.shard --data {home / 'genres_original'} "
            f"--groups {home / 'artists.csv'} --split-file {home / 'splits.csv'} "
            f"--segment-s 1 --hop-s 1 --out shards/{name}"
        )


def main() -> None:
    """Entry of `python -m mgc_dist.synth`."""
    cli.main("synth", SynthConfig, run)


if __name__ == "__main__":
    main()
