"""Runs programs in a sandbox, as whoever started it: a JSON request a line in, a JSON answer a line out."""

import json
import sys

root, settings = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, root)

from stages.rollouts.sandbox.confine import drop_capabilities  # noqa: E402
from stages.rollouts.sandbox.kernel import Offer  # noqa: E402
from stages.rollouts.sandbox.limits import Limits  # noqa: E402
from stages.rollouts.sandbox.sandbox import Sandbox  # noqa: E402

if settings.pop("without_capabilities"):
    drop_capabilities()
limits, offer = Limits(**settings.pop("limits")), settings.pop("offer")
with Sandbox(limits, offer=offer and Offer(**offer), **settings) as sandbox:
    for line in sys.stdin:
        request = json.loads(line)
        if "expressions" in request:
            answer = [[found.data, found.error] for found in sandbox.values(**request)]
        else:
            printed = sandbox.output(request["source"], request["standard_input"])
            answer = [printed.text, printed.problem]
        about = {"folder": str(sandbox.folder), "no_namespaces": sandbox.no_namespaces}
        print(json.dumps({"answer": answer, **about}), flush=True)
