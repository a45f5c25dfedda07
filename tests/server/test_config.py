"""The configuration: where a value comes from, and what is said of one that cannot be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from lovasz.client import access_arguments
from lovasz.server.config import CLIENT_VARIABLES, ServerConfig, unknown_variables
from lovasz.server.settings import ConfigError, format_bytes, parse_bytes, variable_of
from lovasz.version import VERSION


def test_defaults_without_flags_and_variables() -> None:
    assert ServerConfig.load([], {"HOME": "/"}) == ServerConfig()


def test_a_flag_wins_over_its_variable_which_wins_over_the_default() -> None:
    environment = {"LOVASZ_MEMORY_BUDGET": "2GiB", "LOVASZ_MAX_REQUESTS": "7"}
    config = ServerConfig.load(["--memory-budget", "512MiB"], environment)
    assert config.memory_budget_bytes == 512 << 20
    assert config.max_requests == 7
    assert config.listen == ServerConfig().listen


def test_every_setting_can_be_set_both_ways() -> None:
    values = {
        "--listen": ("0.0.0.0:1234", "0.0.0.0:1234"),
        "--metrics-listen": ("[::1]:9999", "[::1]:9999"),
        "--device": ("cuda:1", "cuda:1"),
        "--memory-budget": ("1.5GiB", 3 << 29),
        "--max-requests": ("3", 3),
        "--max-batch-elements": ("1000", 1000),
        "--max-batch-requests": ("5", 5),
        "--max-batch-delay": ("0.25", 0.25),
        "--max-segments": ("1000", 1000),
        "--header-timeout": ("1.5", 1.5),
        "--payload-timeout": ("30", 30.0),
        "--stall-timeout": ("0.5", 0.5),
        "--shared-memory": ("off", False),
        "--max-shared-memory": ("1GiB", 1 << 30),
        "--reflection": ("on", True),
        "--joint-share": ("0.25", 0.25),
        "--joint-regroup": ("2.5", 2.5),
        "--joint-timeout": ("1.5", 1.5),
        "--max-runs": ("7", 7),
        "--max-connection-age": ("600", 600.0),
        "--drain-seconds": ("0", 0.0),
        "--health-interval": ("1.5", 1.5),
        "--device-stall": ("9", 9.0),
        "--otlp-endpoint": ("http://localhost:4317", "http://localhost:4317"),
        "--log-level": ("debug", "debug"),
        "--log-format": ("json", "json"),
    }
    files = {"--tls-cert": "server.pem", "--tls-key": "server.key"}
    values |= {flag: (file, file) for flag, file in files.items()}
    values |= {
        "--tls-client-ca": ("ca.pem", "ca.pem"),
        "--tokens": ("tokens", "tokens"),
        "--metrics-tls": ("on", True),
        "--metrics-tokens": ("tokens", "tokens"),
        "--metrics-hosts": ("gpu7.example.org,.lab.example.org", "gpu7.example.org,.lab.example.org"),
    }
    needed = [word for pair in files.items() for word in pair]
    flags = {f.metadata["flag"]: f.name for f in fields(ServerConfig)}
    assert flags.keys() == values.keys()
    for flag, (text, expected) in values.items():
        assert getattr(ServerConfig.load([*needed, flag, text], {}), flags[flag]) == expected
        assert getattr(ServerConfig.load(needed, {variable_of(flag): text}), flags[flag]) == expected


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [
        ("--listen", "nowhere", "--listen: got 'nowhere'; expected HOST:PORT"),
        ("--listen", "host:99999", "--listen: got 'host:99999'; expected HOST:PORT"),
        ("--listen", "a:1,nowhere", "--listen: got 'a:1,nowhere'; expected HOST:PORT"),
        ("--listen", "a:1,a:1", "--listen: got 'a:1,a:1'; expected each address once"),
        ("--shared-memory", "perhaps", "--shared-memory: got 'perhaps'; expected on or off"),
        ("--listen", "unix://run/s", "--listen: got 'unix://run/s'; expected unix:/path: after unix:// the path"),
        ("--shared-memory", "on", "--listen: got '127.0.0.1:50051'; expected at least one unix:/path with --shared"),
        ("--stall-timeout", "0", "--stall-timeout: got 0.0; expected a number > 0"),
        ("--metrics-listen", "unix:/tmp/x", "--metrics-listen: got 'unix:/tmp/x'; expected HOST:PORT"),
        ("--device", "tpu", "--device: got 'tpu'; expected auto, cpu, cuda or cuda:N"),
        ("--memory-budget", "lots", "--memory-budget: got 'lots'; expected a size such as 512MiB"),
        ("--memory-budget", "0", "--memory-budget: got '0'; expected a size with a unit, such as 512MiB or 4GiB"),
        ("--memory-budget", "4", "--memory-budget: got '4'; expected a size with a unit, such as 512MiB or 4GiB"),
        ("--memory-budget", "4096", "--memory-budget: got '4096'; expected a size with a unit"),
        ("--memory-budget", "4B", "--memory-budget: got 4; expected at least 64 KiB"),
        ("--memory-budget", "0.1KiB", "--memory-budget: got 102; expected at least 64 KiB"),
        ("--memory-budget", f"{10**400}B", f"--memory-budget: got '{10**400}B'; expected at most 1048576 TiB"),
        ("--max-shared-memory", "2000000TiB", "--max-shared-memory: got '2000000TiB'; expected at most 1048576 TiB"),
        ("--max-requests", "99999999999999999999", "--max-requests: got 99999999999999999999; expected at most 65536"),
        ("--max-requests", "two", "--max-requests: got 'two'; expected a whole number"),
        ("--max-requests", "-1", "--max-requests: got -1; expected at least 1"),
        ("--max-batch-delay", "soon", "--max-batch-delay: got 'soon'; expected a number"),
        ("--max-batch-delay", "nan", "--max-batch-delay: got nan; expected a number >= 0"),
        ("--drain-seconds", "inf", "--drain-seconds: got inf; expected a number >= 0"),
        ("--joint-timeout", "1e9", "--joint-timeout: got 1000000000.0; expected a number > 0 and <= 1000000"),
        (
            "--max-connection-age",
            "2592000",
            "--max-connection-age: got 2592000.0; expected a number >= 0 and <= 1000000",
        ),
        ("--device", "cuda:00", "--device: got 'cuda:00'; expected auto, cpu, cuda or cuda:N"),
        ("--device", "cuda:128", "--device: got 'cuda:128'; expected auto, cpu, cuda or cuda:N"),
        ("--health-interval", "0", "--health-interval: got 0.0; expected a number > 0"),
        ("--tls-cert", "a.pem", "--tls-key: got ''; expected a file, as --tls-cert and --tls-key go together"),
        ("--tls-key", "a.key", "--tls-cert: got ''; expected a file"),
        ("--tls-client-ca", "ca.pem", "--tls-client-ca: got 'ca.pem'; expected --tls-cert and --tls-key beside it"),
        ("--metrics-tls", "on", "--metrics-tls: got True; expected --tls-cert and --tls-key beside it"),
        ("--metrics-hosts", "http://gpu7", "--metrics-hosts: got 'http://gpu7'; expected host names"),
        (
            "--otlp-endpoint",
            "localhost:4317",
            "--otlp-endpoint: got 'localhost:4317'; expected http://HOST:PORT or https",
        ),
        ("--log-level", "loud", "--log-level: got 'loud'; expected debug or info or warning or error"),
        ("--log-format", "xml", "--log-format: got 'xml'; expected text or json"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_was_expected(flag: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig.load([flag, text], {})
    assert str(refused.value).startswith(said)


def test_several_addresses_and_a_switch_without_a_value() -> None:
    config = ServerConfig.load(["--listen", "0.0.0.0:1, unix:/a,unix:/b", "--shared-memory"], {})
    assert config.addresses == ("0.0.0.0:1", "unix:/a", "unix:/b")
    assert config.socket_paths == ("/a", "/b")
    assert config.shared_memory
    assert not ServerConfig().shared_memory


@pytest.mark.parametrize(("path", "length"), [("", 0), ("/" + "x" * 107, 108), ("/" + "ö" * 54, 109)])
def test_a_path_that_no_unix_socket_can_have(path: str, length: int) -> None:
    with pytest.raises(ConfigError, match=rf"expected unix:/path with a path of 1 to 107 bytes .this one has {length}"):
        ServerConfig.load(["--listen", f"unix:{path}"], {})


def test_the_longest_paths() -> None:
    path = "/" + "x" * 106
    assert ServerConfig(listen=f"unix:{path}").socket_paths == (path,)
    assert ServerConfig(listen=f"unix://{path}").socket_paths == (path,)
    assert ServerConfig(listen=f"unix:{path[:-7]}", shared_memory=True).socket_paths == (path[:-7],)
    with pytest.raises(ConfigError, match=r"1 to 100 bytes, as --shared-memory appends .memory \(this one has 101\)"):
        ServerConfig(listen=f"unix:{path[:-6]}", shared_memory=True)


def test_a_bad_variable_is_named_as_the_variable() -> None:
    with pytest.raises(ConfigError, match="LOVASZ_MAX_REQUESTS: got 'x'; expected a whole number"):
        ServerConfig.load([], {"LOVASZ_MAX_REQUESTS": "x"})


def test_an_empty_variable_is_none() -> None:
    assert ServerConfig.load([], {"LOVASZ_MEMORY_BUDGET": "", "LOVASZ_DEVICE": ""}) == ServerConfig()


def test_a_misspelt_variable_is_found() -> None:
    environment = {"LOVASZ_MEMORY_BUDGT": "1GiB", "LOVASZ_MAX_REQUESTS": "3", "PATH": "/bin"}
    assert unknown_variables(environment) == ["LOVASZ_MEMORY_BUDGT"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("4294967296", 4 << 30), ("8B", 8), ("1KiB", 1024), ("1.5 MiB", 3 << 19), ("4GiB", 4 << 30), ("2TiB", 2 << 40)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count
    assert parse_bytes(format_bytes(count)) == count


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ServerConfig.load(["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for f in fields(ServerConfig):
        assert f.metadata["flag"] in text
    assert text.count("(default:") == len(fields(ServerConfig))
    assert "LOVASZ_MEMORY_BUDGET" in text


def test_the_version() -> None:
    said = subprocess.run([sys.executable, "-m", "lovasz.server", "--version"], capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, f"lovasz-server {VERSION}\n", "")


@pytest.mark.parametrize("arguments", [["--memory-budget", "many"], ["--no-such-flag"]])
def test_a_wrong_command_line_ends_the_process_with_status_2_and_says_why(arguments: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-m", "lovasz.server", *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert arguments[0] in ended.stderr
    assert "Traceback" not in ended.stderr


def test_variables_of_the_command_are_known() -> None:
    assert set(access_arguments.VARIABLES) == CLIENT_VARIABLES
    assert unknown_variables(dict.fromkeys([*CLIENT_VARIABLES, "LOVASZ_TLS_CERT", "LOVASZ_TLS"], "x")) == ["LOVASZ_TLS"]


def test_opentelemetrys_own_variables_stand_for_the_endpoint() -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4317"}
    assert ServerConfig.load([], environment).otlp_endpoint == "http://all:4317"
    environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = "http://traces:4317"
    assert ServerConfig.load([], environment).otlp_endpoint == "http://traces:4317"
    environment["LOVASZ_OTLP_ENDPOINT"] = "http://own:4317"
    assert ServerConfig.load([], environment).otlp_endpoint == "http://own:4317"


def test_opentelemetrys_variables_that_are_meant_for_others_are_left_alone() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4318"}
    for more in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}):
        assert ServerConfig.load([], {**endpoint, **more}).otlp_endpoint == ""
        own = {"LOVASZ_OTLP_ENDPOINT": "http://own:4317"}
        assert ServerConfig.load([], {**endpoint, **more, **own}).otlp_endpoint == "http://own:4317"
    traces = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}
    assert ServerConfig.load([], {**endpoint, **traces}).otlp_endpoint == "http://all:4318"
    with pytest.raises(ConfigError, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT: got 'all:4317'; expected http://HOST:PORT"):
        ServerConfig.load([], {"OTEL_EXPORTER_OTLP_ENDPOINT": "all:4317"})
