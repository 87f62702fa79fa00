"""Clean an image data set by a run file, and look at the most suspect of what was removed. Copy it and change it.

python pipelines/clean.py pipelines/configs/digits.yaml
"""

import sys

import posttrain


def main(run_file: str) -> None:
    result = posttrain.clean(posttrain.load(run_file))
    print(f"kept {result.summary['live']:,}, removed {result.summary['removed']:,}")
    worst = result.removed.sort_values("mislabel_odds", ascending=False)
    print(worst[["sample_id", "label_name", "suggested_name", "confidence", "reason"]].head(10).to_string(index=False))


if __name__ == "__main__":
    main(sys.argv[1])
