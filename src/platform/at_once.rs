//! Doing something with many objects of a store that is far away: several at a time.

use std::io;
use std::panic::resume_unwind;
use std::thread::{Builder, ScopedJoinHandle};

use crate::error::Result;

/// How many are dealt with at once.
pub const AT_ONCE: usize = 16;

/// Does something with each, several at a time where the store is far away. The results are in their order.
pub fn at_once<T: Sync, R: Send>(
    is_remote: bool,
    all: &[T],
    work: &(impl Fn(&T) -> Result<R> + Sync),
) -> Result<Vec<R>> {
    let each = &|part: &[T]| part.iter().map(work).collect::<Result<Vec<R>>>();
    if !is_remote || all.len() < 2 {
        return each(all);
    }
    let done: Vec<Result<Vec<R>>> = std::thread::scope(|scope| {
        let begun = all.chunks(all.len().div_ceil(AT_ONCE)).map(|part| {
            let thread = Builder::new().name("at-once".into()).spawn_scoped(scope, move || each(part));
            (part, thread)
        });
        let begun: Vec<_> = begun.collect();
        let done = |(part, thread): (&[T], io::Result<ScopedJoinHandle<'_, _>>)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            // There are no more threads to be had.
            Err(_) => each(part),
        };
        begun.into_iter().map(done).collect()
    });
    Ok(done.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    #[test]
    fn results_are_in_order_and_the_first_failure_is_told() {
        for (is_remote, count) in [(true, 0), (true, 1), (true, 2), (true, 15), (true, 16), (true, 1000), (false, 40)] {
            let all: Vec<u64> = (0..count).collect();
            let doubled = at_once(is_remote, &all, &|number| Ok(number * 2)).unwrap();
            assert!(doubled.iter().copied().eq((0..count).map(|number| number * 2)), "{count}");
        }
        let all: Vec<u64> = (0..100).collect();
        let fail = |number: &u64| match number {
            0..30 => Ok(()),
            _ => Err(Error::new(Kind::Io, number.to_string())),
        };
        assert_eq!(at_once(true, &all, &fail).unwrap_err().to_string(), "30");
    }
}
