"""Templates of the cards that go to the Hub; `hf_effml.hub.cards` renders them."""
