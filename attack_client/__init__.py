"""The adversary's room: a client for the service, and attacks over HTTP."""

from attack_client.answers import Answer, Scored
from attack_client.client import AsyncClient, Client, RetryPolicy, ServiceError

__all__ = ["Answer", "AsyncClient", "Client", "RetryPolicy", "Scored", "ServiceError"]
