"""Find the wrong labels of texts: any features do, here TF-IDF reduced to 200 dimensions. Copy it and change it.

    python pipelines/clean_text.py reviews.csv --text review --label sentiment

Writes the rows with a likely label issue, the most suspect first, to standard output as CSV.
"""

import argparse
import sys

import pandas as pd
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

import posttrain


def features_of(texts: list[str], dimensions: int = 200):
    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(texts)
    return TruncatedSVD(min(dimensions, words.shape[1] - 1), random_state=0).fit_transform(words)


def main(csv: str, text: str, label: str) -> pd.DataFrame:
    table = pd.read_csv(csv)
    issues = posttrain.find_label_issues(features_of(table[text].tolist()), table[label])
    print(issues, file=sys.stderr)
    found = table.join(issues.to_frame()).iloc[issues.ranked]
    return found[found["is_label_issue"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find the wrong labels of texts.")
    parser.add_argument("csv")
    parser.add_argument("--text", default="text", help="column with the text")
    parser.add_argument("--label", default="label", help="column with the given label")
    main(**vars(parser.parse_args())).to_csv(sys.stdout)
