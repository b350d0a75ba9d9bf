"""Notes over HTTP, kept in SQLite and shipped to object storage."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from typing import Annotated

from fastapi import Body, Depends, FastAPI, Response

import walship

DATABASE = os.environ.get("NOTES_DB", "notes.db")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # If the file is missing it is restored here.  This connection stays open for the life of the
    # process, so that those of the requests come and go for free; closing it ships the rest.
    with closing(walship.connect(DATABASE)) as db:
        db.execute("create table if not exists notes (id integer primary key, text not null)")
        yield


def database() -> Iterator[walship.Connection]:
    """One connection for each request."""
    with closing(walship.connect(DATABASE)) as db:
        yield db


app = FastAPI(lifespan=lifespan)
Database = Annotated[walship.Connection, Depends(database)]


@app.post("/notes", status_code=201)
def add(text: Annotated[str, Body(embed=True)], db: Database) -> dict[str, int]:
    db.execute("insert into notes (text) values (?)", (text,))
    return {"id": db.last_insert_rowid()}


@app.get("/notes")
def read(db: Database) -> list[str]:
    return [text for (text,) in db.execute("select text from notes order by id")]


@app.get("/health")
def health(response: Response) -> walship.Status:
    status = walship.replication(DATABASE).status()
    if status.state == "stopped":  # another writer owns the replica: commits are refused
        response.status_code = 503
    return status
