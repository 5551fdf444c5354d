"""pytest -p tests.ci.without_extras: the packages of the extras are not found, as after a plain `make setup-dev`."""

from importlib.machinery import PathFinder

#: By the names that are imported: requirements-{serve,demo,stores,trackers,quantization}.txt.
PACKAGES = {
    *("fastapi", "uvicorn", "prometheus_client", "gradio", "obstore", "wandb", "mlflow"),
    *("torchao", "bitsandbytes"),
}

_find = PathFinder.find_spec


def _find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in PACKAGES else _find(name, path, target)


PathFinder.find_spec = staticmethod(_find_spec)
