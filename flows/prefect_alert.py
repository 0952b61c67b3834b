"""Who is told when a deployed run fails: an automation of Prefect's own, which posts to an address."""

from __future__ import annotations

from datetime import timedelta
from urllib.parse import urlsplit
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.types import SecretDict
from pydantic import SecretStr

AUTOMATION = "posttrain: deployed runs that fail are told"
_BLOCK = "posttrain-alert"
_BAD_ENDS = ("Failed", "Crashed")
_WORDS = 'flow_run.name ~ " " ~ flow_run.state.name|lower ~ ": " ~ (flow_run.state.message or "no reason is known")'
_PAYLOAD = '{"text": {{ (' + _WORDS + ' ~ "\\n" ~ flow_run|ui_url)|tojson }}}'
"""What Slack, Mattermost, Google Chat and others take."""


def settle_alert(client: SyncPrefectClient, url: str | None) -> str | None:
    """Post to this address when a deployed run fails or crashes; None: to nobody. What was settled before is replaced.

    Gives that in words, without what is secret of the address.
    """
    for known in client.read_automations_by_name(AUTOMATION):
        client.delete_automation(known.id)
    if url is None:
        return None
    client.create_automation(_automation(_kept(url)))
    return f"deployed runs that fail are told to {urlsplit(url).hostname}"


def _kept(url: str) -> UUID:
    """The address in Prefect's database, which keeps it encrypted."""
    headers = SecretDict({"Content-Type": "application/json"})
    found = Webhook(method="POST", url=SecretStr(url), headers=headers).save(_BLOCK, overwrite=True)
    assert isinstance(found, UUID)
    return found


def _automation(block: UUID) -> AutomationCore:
    trigger = EventTrigger(
        expect={f"prefect.flow-run.{end}" for end in _BAD_ENDS},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.id": "prefect.deployment.*"},
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
    return AutomationCore(
        name=AUTOMATION, trigger=trigger, actions=[CallWebhook(block_document_id=block, payload=_PAYLOAD)]
    )
