//! Tokens are kept by their hashes, in memory that is locked for a moment.

use std::sync::{Mutex, MutexGuard, PoisonError};

use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

/// Of a token.
pub(super) type Hash = [u8; 32];

pub(super) fn hash_of(token: &SecretString) -> Hash {
    Sha256::digest(token.expose_secret()).into()
}

/// What was being changed as somebody panicked is whole all the same.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
