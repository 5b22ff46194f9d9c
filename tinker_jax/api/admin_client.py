"""`AdminClient`: an organisation's books, which need a cloud account."""

from __future__ import annotations

from datetime import date, datetime
from typing import Literal, NoReturn

from tinker_jax.api.deprecation import final_twin
from tinker_jax.types.errors import UnsupportedError


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(f"{what} needs a cloud account, which does not exist in process")


class AdminClient:
    """Every call raises UnsupportedError.

    Args:
        base_url, api_key: accepted for compatibility, no effect.
    """

    def __init__(self, *, base_url: str | None = None, api_key: str | None = None) -> None:
        pass

    def get_audit_log(
        self,
        event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
        day: date | None = None,
    ) -> NoReturn:
        """Refused: needs an account."""
        _refuse("the audit log")

    get_audit_log_async = final_twin(get_audit_log)

    def get_billing_usage(self, starting_on: datetime | str, ending_before: datetime | str) -> NoReturn:
        """Refused: needs an account."""
        _refuse("billing")

    get_billing_usage_async = final_twin(get_billing_usage)

    def get_current_checkpoint_storage_usage(self, project_id: str | None = None) -> NoReturn:
        """Refused: needs an account."""
        _refuse("the storage bill")

    get_current_checkpoint_storage_usage_async = final_twin(get_current_checkpoint_storage_usage)

    def get_telemetry(self) -> None:
        """Nothing is ever sent anywhere."""
        return None
