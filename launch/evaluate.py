"""Measure a run: `deepspeed launch/evaluate.py RUN [flags]`; `--help` lists the flags."""

from mgc_dist.evaluate import main

if __name__ == "__main__":
    main()
