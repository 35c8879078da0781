"""The adversary's room: a client for the service, and attacks over HTTP."""

from attack_client.answers import Answer, Scored
from attack_client.client import AsyncClient, Client, LostAnswerError, ServiceError
from attack_client.retry import RetryPolicy

__all__ = ["Answer", "AsyncClient", "Client", "LostAnswerError", "RetryPolicy", "Scored", "ServiceError"]
