//! A store under bad weather, for tests and measurements with whole processes: far away, or cut off for a while.
//!
//! `EPOCHFS_STORE_WEATHER` names a file, which is read before each request and may change at any time. It has words:
//! `delay=100` makes each request take so many milliseconds more; `cut=requests` lets none arrive, and `cut=answers` has
//! each done without its answer coming back; `patience=300` is how long a request that is cut off is waited for before it
//! fails as one to a service that does not answer.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Counters, ObjectInfo, ObjectWriter, Put, Reach, Store, Tail, TrafficTotals};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::files::Room;

/// What names the file.
pub const WEATHER_VARIABLE: &str = "EPOCHFS_STORE_WEATHER";

/// How often a request that is cut off looks whether it goes on.
const LOOK: Duration = Duration::from_millis(10);

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Weather {
    delay: Duration,
    cut: Cut,
    patience: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Nothing,
    Requests,
    Answers,
}

impl Weather {
    fn parse(text: &str) -> Self {
        let mut weather = Self { delay: Duration::ZERO, cut: Cut::Nothing, patience: PATIENCE };
        for word in text.split_ascii_whitespace() {
            let ms = |value: &str| value.parse().map(Duration::from_millis).unwrap_or_default();
            match word.split_once('=') {
                Some(("delay", value)) => weather.delay = ms(value),
                Some(("patience", value)) => weather.patience = ms(value),
                Some(("cut", "requests")) => weather.cut = Cut::Requests,
                Some(("cut", "answers")) => weather.cut = Cut::Answers,
                _ => {}
            }
        }
        weather
    }
}

/// A store whose weather a file tells.
pub struct WeatherStore {
    inner: Arc<dyn Store>,
    file: PathBuf,
}

impl WeatherStore {
    /// The store itself where no weather is asked for.
    pub fn around(inner: Arc<dyn Store>) -> Arc<dyn Store> {
        match std::env::var_os(WEATHER_VARIABLE) {
            Some(file) => Arc::new(Self { inner, file: file.into() }),
            None => inner,
        }
    }

    #[cfg(test)]
    pub fn of(inner: Arc<dyn Store>, file: PathBuf) -> Self {
        Self { inner, file }
    }

    fn weather(&self) -> Weather {
        // Without a file the weather is fine.
        Weather::parse(&std::fs::read_to_string(&self.file).unwrap_or_default())
    }

    fn wait_while(&self, is_cut: impl Fn(&Weather) -> bool) -> Result<()> {
        let since = Stopwatch::start();
        loop {
            let weather = self.weather();
            if !is_cut(&weather) {
                return Ok(());
            }
            if since.elapsed() >= weather.patience {
                let what = format!("{} does not answer", self.inner.url());
                return Err(Error::new(Kind::Unavailable, what).hint("it is cut off by the weather that was asked for"));
            }
            std::thread::sleep(LOOK);
        }
    }

    fn under_it<T>(&self, request: impl FnOnce() -> Result<T>) -> Result<T> {
        std::thread::sleep(self.weather().delay);
        self.wait_while(|weather| weather.cut == Cut::Requests)?;
        let answer = request();
        self.wait_while(|weather| weather.cut != Cut::Nothing)?;
        answer
    }
}

impl Store for WeatherStore {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote() || !self.weather().delay.is_zero()
    }

    fn traffic(&self) -> Option<TrafficTotals> {
        self.inner.traffic()
    }

    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    fn distrust(&self, key: &str) -> bool {
        self.inner.distrust(key)
    }

    fn let_go(&self) {
        self.inner.let_go();
    }

    fn be_brief(&self) {
        self.inner.be_brief();
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.under_it(|| self.inner.get(key))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.under_it(|| self.inner.get_range(key, range))
    }

    fn read_into(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<()> {
        self.under_it(|| self.inner.read_into(key, start, buffer))
    }

    fn get_within(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.under_it(|| self.inner.get_within(key, range))
    }

    fn read_within(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<usize> {
        self.under_it(|| self.inner.read_within(key, start, buffer))
    }

    fn will_need(&self, key: &str, range: Range<u64>) {
        self.inner.will_need(key, range);
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        self.under_it(|| self.inner.get_tail(key, len))
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        self.under_it(|| self.inner.len(key))
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        self.under_it(|| self.inner.put_if_absent(key, parts))
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.under_it(|| self.inner.replace(key, bytes))
    }

    fn settle(&self, key: &str) -> Result<()> {
        self.inner.settle(key)
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        self.under_it(|| self.inner.writer(key))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.under_it(|| self.inner.list(prefix, after, each))
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.under_it(|| self.inner.list_dirs(prefix))
    }

    fn room(&self) -> Option<Room> {
        self.inner.room()
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.under_it(|| self.inner.delete(key))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::platform::files::SimFiles;
    use crate::platform::store::LocalStore;

    #[test]
    fn what_is_cut_off_fails_and_what_was_done_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("weather");
        let local = LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap();
        let store = WeatherStore::of(Arc::new(local), file.clone());
        assert_eq!(store.put_if_absent("a", &[b"a"]).unwrap(), Put::Created);
        std::fs::write(&file, "cut=requests patience=20").unwrap();
        assert_eq!(store.put_if_absent("b", &[b"b"]).unwrap_err().kind(), Kind::Unavailable);
        std::fs::write(&file, "cut=answers patience=20").unwrap();
        assert_eq!(store.put_if_absent("c", &[b"c"]).unwrap_err().kind(), Kind::Unavailable);
        std::fs::write(&file, "delay=30").unwrap();
        let since = Stopwatch::start();
        assert_eq!((store.len("b").unwrap(), store.len("c").unwrap()), (None, Some(1)));
        assert!(since.elapsed() >= Duration::from_millis(60) && store.is_remote());
    }
}
