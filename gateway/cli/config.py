"""`vdi-gateway config-show`: the effective configuration as a configuration file, with reasons."""

import json
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag, Texts
from gateway.cli.serve import read
from gateway.config import Config, Origins, Source
from gateway.options import OPTIONS
from gateway.state import STATE_DIR_VARIABLE

_WIDTH = 100


def config_show(
    *,
    state_dir: Annotated[FileName, Parameter(env_var=STATE_DIR_VARIABLE)] = "./state",
    config: FileName | None = None,
    http: Texts = None,
    https: Texts = None,
    insecure: Flag = False,
    nbd: str | None = None,
    insecure_nbd: Flag = False,
    tls_cert: FileName | None = None,
    tls_key: FileName | None = None,
    log_level: str | None = None,
    log_format: str | None = None,
) -> int:
    """Print the configuration that serve would have with the same arguments.

    It is TOML that serve takes as it is: every option, above it the reason of its default and what is
    allowed, beside it where its value comes from. It also checks: a mistake in the file is told.

    Parameters
    ----------
    state_dir
        State directory of the gateway; DIR/config.toml is read if it is there.
    config
        Configuration file to read in its place.
    http
        As for serve.
    https
        As for serve.
    insecure
        As for serve.
    nbd
        As for serve.
    insecure_nbd
        As for serve.
    tls_cert
        As for serve.
    tls_key
        As for serve.
    log_level
        As for serve.
    log_format
        As for serve.
    """
    arguments = {
        "listen.http": http or None,
        "listen.https": https or None,
        "listen.insecure": insecure or None,
        "listen.nbd": nbd,
        "listen.insecure_nbd": insecure_nbd or None,
        "tls.certificate": tls_cert and os.path.abspath(tls_cert),
        "tls.key": tls_key and os.path.abspath(tls_key),
        "log.level": log_level,
        "log.format": log_format,
    }
    found = read(Origins(state_dir=state_dir, file=config, arguments=arguments))
    sys.stdout.write("\n".join(lines_of(found)) + "\n")
    return 0


def lines_of(config: Config) -> Iterator[str]:
    """The lines of the file."""
    yield f"# {f'read from {config.file}' if config.file else 'no configuration file was read'}"
    section = ""
    for option in OPTIONS:
        if option.section != section:
            section = option.section
            yield from ("", f"[{section}]")
        when = "" if option.live else " Changes by a restart alone."
        shown = _toml(option.shown(option.default))
        yield ""
        yield from _comment(f"{option.reason}. {_sentence(option.allowed)}.{when}")
        setting = config.settings[option.path]
        source = setting.source.value
        if setting.source is not Source.DEFAULT:
            source = f"{source}; the default is {shown}"
        yield f"{option.key} = {_toml(option.shown(setting.value))}  # {source}"


def _sentence(allowed: str) -> str:
    return allowed[0].upper() + allowed[1:]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        _sentence(text), _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def _toml(value: Any) -> str:
    # TOML's texts, numbers, lists and booleans are JSON's, but for DEL, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
