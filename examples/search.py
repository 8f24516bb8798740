"""From a model to a pruned one: python examples/search.py MODEL TEXT OUT."""

import sys
from pathlib import Path

import secateur

model, text, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])

# What the dense model does with the text, once for all searches.
secateur.calibrate(model, out / "calibration", text=text)
run = secateur.run_search(out / "calibration", out / "run", sparsity=0.6, budget=40)

# The verdict with the front, and the rows behind it as a DataFrame.
print(run)
print(run.frame()["status"].value_counts().to_dict())
run.plot("front").figure.savefig(out / "front.svg")
run.report(out / "report.html")

# The best rule on the whole model, and what it has become.
run.prune(out / "pruned", model=model, text=text, repair="obs")
found = secateur.evaluate(out / "pruned", text=text, against=model)
print(f"KL {found['kl']:.4f}, perplexity {found['perplexity']:.1f}")
