"""`darkroom keys`: make, list and end API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from darkroom.cli.common import DataDir, RedisUrl, print_table, settings_of_redis
from darkroom.jobs import Priority

keys = typer.Typer(help="API keys of a server with DARKROOM_AUTH=keys.", no_args_is_help=True)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What the key is called in lists.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose jobs it sees; several keys may share one. (default: the name)")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="generate, read (its tenant's jobs) or admin (all); may be given again. (default: generate)"),
    ] = None,
    weight: Annotated[float, typer.Option(min=0.01, max=100, help="Share of the workers beside other tenants.")] = 1,
    rate: Annotated[str | None, typer.Option(help="Calls per s, m, h or d, such as 60/m. (default: no limit)")] = None,
    burst: Annotated[int | None, typer.Option(min=1, help="Calls that may come at once. (default: the rate's)")] = None,
    max_cost: Annotated[
        int | None,
        typer.Option(min=1, help="Most that its unfinished jobs may cost: model rows × evaluations × latent pixels."),
    ] = None,
    priority: Annotated[Priority, typer.Option(help="Highest class it may ask for.")] = Priority.HIGH,
    expires: Annotated[str | None, typer.Option(help="When it ends: 90d, 12h or 2030-01-31. (default: never)")] = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Make a key and print it. It is shown this once: Darkroom keeps its hash alone."""
    import asyncio

    settings = settings_of_redis("keys", redis_url, data_dir, log_level="warning")
    from darkroom.keys import create

    key, token = asyncio.run(
        create(
            settings,
            name=name,
            tenant=tenant,
            scopes=scope or ["generate"],
            weight=weight,
            rate=rate,
            burst=burst,
            max_cost=max_cost,
            priority=priority,
            expires=expires,
        )
    )
    typer.echo(f"key {key.id} of tenant {key.tenant}; it is shown this once:", err=True)
    typer.echo(token)


@keys.command("list")
def list_keys(data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """List the keys there are, without their secrets."""
    import asyncio

    settings = settings_of_redis("keys", redis_url, data_dir, log_level="warning")
    from darkroom.keys import table

    print_table(asyncio.run(table(settings)))


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """End a key. Servers refuse it within two seconds; jobs that it has asked for go on."""
    import asyncio

    settings = settings_of_redis("keys", redis_url, data_dir, log_level="warning")
    from darkroom.keys import revoke

    asyncio.run(revoke(settings, key_id))
    typer.echo(f"key {key_id} is revoked")
