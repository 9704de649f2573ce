"""Studies: arms compared over seeds, as study.yaml says: cells, the queue that computes them, tables of the answers."""
