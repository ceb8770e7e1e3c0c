"""What has a model kept of its training images? Copies, membership, canaries, and what its files give away.

Each module asks one question and says what it cannot see; :mod:`medvdm.evaluation.privacy.verdict` puts the answers
into words. No number here certifies that nothing leaks.
"""
