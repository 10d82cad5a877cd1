"""What `apportion.activations` used to hold, under its names of then: now the rooms rows, language and synthetic."""

import sys
from importlib import import_module

FILES = {
    "rows": "arrays batch filter manifest order sane shards sites source store stream writer",
    "language": "collect contexts documents effect fingerprint hookpoints live model passes text text_files "
    "text_streams tokens upper",
    "synthetic": "ground_truth world",
}
for _name, _files in FILES.items():
    _room = import_module(f"apportion.{_name}")
    globals().update({name: value for name, value in vars(_room).items() if not name.startswith("_")})
    for _file in _files.split():
        sys.modules[f"{__name__}.{_file}"] = import_module(f"apportion.{_name}.{_file}")
