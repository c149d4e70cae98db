"""Examine a run: `deepspeed launch/exam.py RUN [flags]`; `--help` lists the flags."""

from mgc_dist.exam import main

if __name__ == "__main__":
    main()
