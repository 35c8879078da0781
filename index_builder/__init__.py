"""The offline room: trains, attacks, embeds, indexes, and writes a bundle."""
