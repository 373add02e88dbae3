"""The parts that let one machine run everything: PostgreSQL, a streaming replica and Apache Kafka.

Each part is a server process of its own in a data directory of the caller's choice. The directory
survives restarts, `kill -9` included. `program` starts what runs beside them. All calls here block; from asyncio use
`asyncio.to_thread`.
"""
