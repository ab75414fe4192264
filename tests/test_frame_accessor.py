"""The accessor is attached when pandas is imported, and removed by `unregister`; `test_batch.py` tests it."""

from __future__ import annotations

from tests.support.engines import HANG_GUARD_S, REPOSITORY, says, script

BEFORE_PANDAS = """
import importlib.util
import sys
from sollol_nb import frame_accessor

frame_accessor.register()
assert "pandas" not in sys.modules
frame_accessor.unregister()
frame_accessor.register()
assert importlib.util.find_spec("pandas") is not None  # others look whether it is there, and do not import it
import pandas as pd
print("has", hasattr(pd.DataFrame(), "sollol"), pd.__spec__.loader is pd.__loader__, pd.DataFrame({"a": [1]}).a[0])
frame_accessor.unregister()
print("has", hasattr(pd.DataFrame(), "sollol"), len(pd.DataFrame._accessors))
"""


TAKEN_BACK = """
import importlib.util
import sys
from sollol_nb import frame_accessor

frame_accessor.register()
spec = importlib.util.find_spec("pandas")
frame_accessor.unregister()
sys.modules["pandas"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("has", hasattr(module.DataFrame, "sollol"), flush=True)
"""


def test_an_unregistered_accessor_is_not_attached_to_pandas() -> None:
    with script(TAKEN_BACK, PYTHONPATH=str(REPOSITORY)) as process:
        assert says(process, "has") == "False"
        assert process.wait(HANG_GUARD_S) == 0


def test_the_accessor_waits_for_pandas_to_be_imported() -> None:
    with script(BEFORE_PANDAS, PYTHONWARNINGS="error", PYTHONPATH=str(REPOSITORY)) as process:
        assert says(process, "has") == "True True 1"
        assert says(process, "has").startswith("False")
        assert process.wait(HANG_GUARD_S) == 0
