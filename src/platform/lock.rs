//! Taking a lock whatever became of those who held it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes it, also after a thread panicked with it: what these locks guard is whole between any two statements.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
