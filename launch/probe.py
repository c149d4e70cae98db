"""Probe a frozen model: `deepspeed launch/probe.py [flags]`; `--help` lists the flags."""

from mgc_dist.probe import main

if __name__ == "__main__":
    main()
