# %% [markdown]
# # A run in a notebook
# Cells for Jupyter (`# %%`), or a script: `python examples/notebook.py RUN OUT`. The run may still be going.

# %%
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # in a notebook leave this line out
import secateur

run, out = sys.argv[1], Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
archive = secateur.open(run)

# %% What has been tried, and how it ended
rows = archive.frame()
print(f"{len(rows)} candidates so far:", rows["status"].value_counts().to_dict())

# %% The front, as a DataFrame and as a picture
front = archive.front()
print(front[["metric", "kl", "size", "baseline"]].to_string(index=False))
axes = rows[rows["status"] == "measured"].plot.scatter("size", "kl", color="silver", logy=True)
front.plot(x="size", y="kl", style="o-", ax=axes, legend=False, title=f"front of {run}")
axes.figure.savefig(out / "front.svg")

# %% How it got there, and what the published rules give
history = archive.history()
history.plot(x="seconds", y="best").figure.savefig(out / "history.svg")
print(archive.baselines()[["baseline", "kl", "perplexity"]].to_string(index=False))

# %% Fronts by other columns, without asking the archive again
cheap = rows[rows["status"] == "measured"].pareto.front(minimize=["kl", "seconds"])
print(f"{len(cheap)} candidates are on the front of quality and time")

# %% The best rule, as a Python file that needs torch alone
best = archive.best("kl")
path = secateur.export(run, best["key"], to="python", out=out / "best.py")
print(f"the best so far is `{best['metric']}`, KL {best['kl']:.4f}: {path}")
