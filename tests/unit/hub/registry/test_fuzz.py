"""Whatever is asked of the API, the hub does not fail: schemathesis over the whole OpenAPI document."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from palestra.hub.evals.pages import HOME as EVALUATIONS
from palestra.hub.registry.actions import ACTIONS
from palestra.hub.registry.pages import PAGES
from tests.unit.hub.registry.packages import wheel

pytestmark = pytest.mark.slow

EXAMPLES = 12


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of what schemathesis sends archives by
def test_no_request_makes_the_hub_fail(served):
    served.push(wheel(requires=["palestra"]))
    served.http.raise_server_exceptions = False
    schema = schemathesis.openapi.from_dict(served.get("/openapi.json").json())
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        seen.add(operation.path)

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            sent = case.as_transport_kwargs(base_url="http://localhost")
            for name in ("root", ""):
                headers = dict(sent.get("headers") or {}) | served.as_(name)
                found = {key: sent[key] for key in ("params", "json", "data", "content") if sent.get(key) is not None}
                answer = served.http.request(sent["method"], sent["url"], headers=headers, **found)
                assert answer.status_code < 500, (sent, answer.text)

        given(case=operation.as_strategy())(check)()
    shown, done = {f"{page.path}.json" for page in PAGES}, {action.path for action in ACTIONS}
    assert seen == shown | done | {EVALUATIONS}
