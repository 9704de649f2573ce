"""Parts of `studies/study.py`: what a study is, its cells, the queue that computes them, and its tables."""
