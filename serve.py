"""The decision service: the state of a cluster in, what starts where and the priority of every queued job out.

    python serve.py --policy runs/RUN/policy.onnx
    curl localhost:8000/v1/decisions --json @state.json

The contract, with examples, is in docs/deploy.md. The work is done in deployment/: contract.py (what is sent and
answered, and how a state is checked), service.py (the policy, its deadline and fallback), http_api.py, processes.py.
"""

import signal
import sys

import tyro

from deployment.processes import check, listen, log_to_stderr, read_token, supervise, work
from deployment.service import Args, Service, log


def main(args: Args) -> None:
    log_to_stderr()
    signal.signal(signal.SIGHUP, lambda *_: None)  # too early to reload anything, and no reason to end
    try:
        check(args)
        token = read_token(args)
        service = Service(args)
        listener = listen(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    where = args.unix_socket or "http://{}:{}".format(*listener.getsockname()[:2])
    log.info("policy %s, version %s, at %s", service.model.policy.name, service.model.version, where)
    if args.workers == 1:
        work(service, token, listener)
    else:
        supervise(service, token, listener)


if __name__ == "__main__":
    main(tyro.cli(Args))
