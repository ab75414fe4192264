"""Priorities by level, role and task, under the name that the guide uses; the code is in `runtime/priority.py`."""

from sollol_nb.runtime.priority import (
    ROLE_PRIORITIES,
    TASK_PRIORITIES,
    Priority,
    get_priority_for_role,
    get_priority_for_task,
)

__all__ = ["ROLE_PRIORITIES", "TASK_PRIORITIES", "Priority", "get_priority_for_role", "get_priority_for_task"]
