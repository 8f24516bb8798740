"""Keys: which candidate of a run is meant."""

from __future__ import annotations

import difflib

from .database import ArchiveError
from .store import Store


def whole_key(store: Store, beginning: str) -> str:
    """Return the key of the candidate that is meant: by its beginning, or ``best``, the front's first row.

    A published rule is also meant by the name under which tables show it.

    Raises:
        ArchiveError: When no candidate or more than one is meant; the nearest keys are named.
    """
    run = store.folder
    if beginning == "best":
        from .front import front_of_store  # imports pandas

        objective, *others = store.fact("objectives", ["kl"])
        if "density" in others:
            raise ArchiveError(
                f"expected a key, got best: over the sparsities of {run} none is, for the least {objective} "
                f"is that of the least sparse; `secateur front {run}` shows the keys"
            )
        best = front_of_store(store, [objective, *others])
        if best.empty:
            raise ArchiveError(f"no candidate of {run} has {objective} yet: there is no best one")
        return str(best.iloc[0]["key"])
    keys = [key for (key,) in store.rows("SELECT key FROM trials ORDER BY number")]
    told = set(keys)
    published = {name: key for key, name in store.fact("baselines", {}).items() if key in told}
    if beginning in published:
        return str(published[beginning])
    found = [key for key in keys if key.startswith(beginning)] if beginning else []
    if beginning in found or len(found) == 1:
        return beginning if beginning in found else found[0]
    if found:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ArchiveError(f"{beginning!r} begins {len(found)} keys of {run} ({some}); give more of it")
    near = difflib.get_close_matches(beginning, published, n=3, cutoff=0.6)
    near = near or difflib.get_close_matches(beginning, keys, n=3, cutoff=0)
    hint = f"the nearest are {', '.join(near)}" if near else "it has no candidates"
    raise ArchiveError(
        f"no candidate of {run} has the name {beginning!r} or a key that begins with it: {hint}"
    )
