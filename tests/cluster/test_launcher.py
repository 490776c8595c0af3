"""The cluster launcher's file for hosts that are there anyway, read as Ray reads it."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAB = yaml.safe_load((ROOT / "cluster/ray/lab.yaml").read_text())
SCHEMA = Path(sysconfig.get_path("purelib")) / "ray/autoscaler/ray-schema.json"


def test_it_is_valid_by_rays_own_schema() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(LAB, schema)
    broken = {**LAB, "worker_start_ray_command": []}
    assert list(jsonschema.Draft7Validator(schema).iter_errors(broken)), "the schema is closed"


def test_ray_prepares_it_with_every_host_from_the_start() -> None:
    program = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
config = prepare_config(yaml.safe_load(sys.stdin))
validate_config(config)
options = sorted({name for option in start.params for name in option.opts})
print(json.dumps({"types": config["available_node_types"], "options": options}))
"""
    text = (ROOT / "cluster/ray/lab.yaml").read_text()
    done = subprocess.run(
        [sys.executable, "-c", program], input=text, capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    hosts = len(LAB["provider"]["worker_ips"])
    (node,) = answer["types"].values()
    assert (node["min_workers"], node["max_workers"]) == (hosts, hosts)
    for commands in (LAB["head_start_ray_commands"], LAB["worker_start_ray_commands"]):
        used = {word.partition("=")[0] for word in shlex.split(commands[-1]) if word.startswith("--")}
        assert used <= set(answer["options"])


def test_nothing_is_left_open() -> None:
    for commands in (LAB["head_start_ray_commands"], LAB["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
        assert not re.search(r"0\.0\.0\.0|RAY_AUTH_TOKEN=", " ".join(commands))
    assert "--dashboard-host=127.0.0.1" in LAB["head_start_ray_commands"][-1]
    assert "chmod 600 ~/.ray/auth_token" in LAB["setup_commands"]


def test_it_installs_what_the_image_has() -> None:
    assert any("-r ~/prism-ray/cluster/requirements.txt" in command for command in LAB["setup_commands"])
    assert (ROOT / "cluster/requirements.txt").is_file()
