//! Objects: named, immutable byte strings. The whole repository is made of them.
//!
//! A store promises five things and nothing else:
//! - an object that a put or a finished writer reported as created is durable and complete;
//! - of several racing puts of one key, exactly one is told `Created`;
//! - an object is absent or whole, never half there;
//! - what was written is never changed, only deleted;
//! - an object that is replaced, because it was damaged or is emptied, is read as before or as after, whole.

mod cached;
mod cloud;
#[cfg(test)]
pub(crate) mod contract;
mod counters;
pub mod faulty;
mod key;
pub mod local;
mod location;
pub mod remote;
mod sealed;
mod weather;

use std::ops::Range;

use bytes::Bytes;

pub use cached::{Cache, CacheSettings, CacheTotals, CachedStore, KeptStore};
pub use cloud::{Reach, TrafficTotals, Variables};
pub use counters::{Counters, Totals};
pub use faulty::FaultyStore;
pub use key::{TEMPORARY, check_key, check_prefix};
pub use local::LocalStore;
pub use location::{BucketUrl, Location, Service};
pub use remote::RemoteStore;
pub use sealed::SealedStore;
pub use weather::{WEATHER_VARIABLE, WeatherStore};

use crate::error::{Error, Result};
use crate::platform::files::Room;

/// The answer to a put-if-absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    /// The key is taken. On a store that retries by itself this can be the answer to our own first try:
    /// whoever cares reads the object back and compares its writer id.
    Exists,
}

/// The end of an object.
#[derive(Clone, Debug)]
pub struct Tail {
    pub bytes: Bytes,
    pub object_len: u64,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    pub key: String,
    pub len: u64,
}

/// An object that is small if it is what it should be: a longer one is not read.
pub fn get_small(store: &dyn Store, key: &str, len_max: u64) -> Result<Bytes> {
    let tail = store.get_tail(key, len_max)?;
    match tail.object_len > len_max {
        true => Err(Error::damaged(format!("{key} has {} bytes, and at most {len_max} make sense", tail.object_len))),
        false => Ok(tail.bytes),
    }
}

/// All keys that begin with `prefix` (which ends with a slash), in byte order: for few.
pub fn keys_below(store: &dyn Store, prefix: &str) -> Result<Vec<String>> {
    let mut keys = Vec::new();
    store.list(prefix, None, &mut |info| {
        keys.push(info.key);
        Ok(true)
    })?;
    Ok(keys)
}

pub trait Store: Send + Sync {
    /// Where this is, for messages.
    fn url(&self) -> String;

    /// What was asked of this store so far.
    fn counters(&self) -> &Counters;

    /// Whether each request travels, so that fewer and larger ones are better.
    fn is_remote(&self) -> bool {
        false
    }

    /// The requests that went over a network for it, if there is one.
    fn traffic(&self) -> Option<TrafficTotals> {
        None
    }

    /// Whether it answers, as far as requests told.
    fn reach(&self) -> Reach {
        Reach::default()
    }

    /// What is kept of it on a local disk, if anything is.
    fn cache(&self) -> Option<CacheTotals> {
        None
    }

    /// Forgets what is kept of an object, whose bytes were found wrong; says whether they may have been right elsewhere, so
    /// that it is worth while to read it again.
    fn distrust(&self, _key: &str) -> bool {
        false
    }

    /// Forgets which objects are open: what is read next is what has the name then. What lies on other machines, others may have
    /// replaced or deleted without this one being told.
    fn let_go(&self) {}

    /// From here on nobody waits long where nothing is answered, those included who wait already: what is left to do can also be
    /// left.
    fn be_brief(&self) {}

    /// The whole object.
    fn get(&self, key: &str) -> Result<Bytes>;

    /// Exactly these bytes; an object too short for them is damaged.
    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes>;

    /// The same into a buffer, for whoever reads small pieces often and proves what they are: an object that somebody
    /// else deleted may still be read.
    fn read_into(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<()> {
        let bytes = self.get_range(key, start..start.saturating_add(buffer.len() as u64))?;
        if bytes.len() != buffer.len() {
            let (url, wanted, got) = (self.url(), buffer.len(), bytes.len());
            return Err(Error::damaged(format!("{url} answered with {got} bytes of object {key} instead of {wanted}")));
        }
        buffer.copy_from_slice(&bytes);
        Ok(())
    }

    /// As [`Store::get_range`], but where the object ends within the range, what there is of it: for whoever learns only from
    /// the bytes where it ends. None where the range begins behind the end.
    fn get_within(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        match self.len(key)? {
            Some(len) => self.get_range(key, range.start.min(len)..range.end.min(len)),
            None => Err(Error::not_found(format!("there is no object {key} in {}", self.url()))),
        }
    }

    /// The same into a buffer, as [`Store::read_into`]; says how many bytes there were.
    fn read_within(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<usize> {
        let bytes = self.get_within(key, start..start.saturating_add(buffer.len() as u64))?;
        let Some(filled) = buffer.get_mut(..bytes.len()) else {
            return Err(Error::damaged(format!(
                "{} answered with more of object {key} than was asked for",
                self.url()
            )));
        };
        filled.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    /// The whole object for whoever looks for what is sound of a damaged one: what the store itself can tell to be wrong is
    /// zeros, and what is cut off is missing.
    fn get_damaged(&self, key: &str) -> Result<Bytes> {
        self.get(key)
    }

    /// Bytes that will be read soon: the store may begin to fetch them. Returns at once.
    fn will_need(&self, _key: &str, _range: Range<u64>) {}

    /// The last `len` bytes, or all of a shorter object.
    fn get_tail(&self, key: &str, len: u64) -> Result<Tail>;

    /// The object's length, or `None` when it does not exist.
    fn len(&self, key: &str) -> Result<Option<u64>>;

    /// Creates the object from the parts put end to end, durably, unless the key is taken.
    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put>;

    /// Puts an object durably in the place of what lies under its key, if anything does: whoever reads meanwhile is given
    /// the old bytes or the new. For bytes alone that say what the object's name stands for, where what is stored does not,
    /// or says more than anybody needs.
    fn replace(&self, key: &str, _bytes: &[u8]) -> Result<()> {
        Err(Error::new(crate::error::Kind::Unsupported, format!("{} cannot replace object {key}", self.url())))
    }

    /// Makes sure that an object that was found is durable, before anything leans on it: whoever wrote it may have died
    /// before that. One that a put or a finished writer reported is durable already.
    fn settle(&self, _key: &str) -> Result<()> {
        Ok(())
    }

    /// Streams a large object to a key that nobody else uses (its name is random).
    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>>;

    /// Keys that begin with `prefix` (which ends with a slash), in byte order, after `after` if given.
    /// Calls `each` until it returns false.
    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()>;

    /// The names directly under `prefix` (which ends with a slash) that hold further names, in byte order,
    /// without the prefix and without a slash at the end.
    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>>;

    /// How much room there is, if the store has an end.
    fn room(&self) -> Option<Room> {
        None
    }

    /// Removes an object. One that is not there is fine.
    fn delete(&self, key: &str) -> Result<()>;
}

/// An object being streamed. Dropping it without `finish` leaves nothing behind.
pub trait ObjectWriter: Send {
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Returns when the object is complete and durable.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Refuses a range that runs backwards, and one that the object is too short for.
fn check_range(key: &str, url: impl FnOnce() -> String, range: &Range<u64>, object_len: u64) -> Result<()> {
    if range.start > range.end {
        return Err(Error::usage(format!("the range {range:?} of object {key} in {} runs backwards", url())));
    }
    if range.end > object_len {
        let (url, end) = (url(), range.end);
        return Err(Error::damaged(format!("object {key} in {url} is shorter than {end} bytes: it has {object_len}")));
    }
    Ok(())
}
