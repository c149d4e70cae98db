"""Make the bias table: `deepspeed launch/bias.py [flags]`; `--help` lists the flags."""

from mgc_dist.bias import main

if __name__ == "__main__":
    main()
