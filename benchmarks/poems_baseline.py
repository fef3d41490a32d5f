"""TF-IDF + logistic regression on the bundled poems: what no language model at all reaches.

python -m benchmarks.poems_baseline
"""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from katei.data import load_dataset
from katei.study.intervals import clopper_pearson


def main() -> None:
    for name in ("poems", "poems-en"):
        data = load_dataset(name)
        assert data.test is not None
        model = make_pipeline(
            TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True),
            LogisticRegression(C=10, class_weight="balanced", max_iter=1000),
        )
        model.fit(data.train.texts, data.train.labels)
        correct = int((model.predict(data.test.texts) == data.test.labels).sum())
        low, high = clopper_pearson(correct, len(data.test.labels))
        print(
            f"{name}: {correct} of {len(data.test.labels)} test rows, {correct / 54:.3f}, 95 % {low:.3f} – {high:.3f}"
        )


if __name__ == "__main__":
    main()
