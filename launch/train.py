"""Train the main model: `deepspeed launch/train.py [flags]`; `--help` lists the flags."""

from mgc_dist.train import main

if __name__ == "__main__":
    main()
