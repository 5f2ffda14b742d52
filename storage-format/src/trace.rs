//! A trace: in which order restores of a stream first touched its pages.
//!
//! A hint and nothing else: whoever loses it, or gets a wrong one, is slower and not wrong.

use std::ops::Range;

use crate::error::{FormatError, Result, invalid};
use crate::manifest::IMAGE_LEN_MAX;
use crate::name::check_stream_path;
use crate::page::PAGE_SIZE;
use crate::wire::{Put, Reader, number, put_number};

const WHAT: &str = "trace";
const MAGIC: [u8; 8] = *b"EPOCHTRC";
const TRACE_VERSION: u16 = 1;

/// The most runs of a trace: what is touched later is not told.
pub const TRACE_RUNS_MAX: usize = 1 << 17;

/// The most packs that hold a trace's pages once more.
pub const TRACE_WINDOWS_MAX: usize = 255;

/// No trace has more bytes: two numbers of at most ten bytes for each run, and the rest.
pub const TRACE_LEN_MAX: u64 = 20 * TRACE_RUNS_MAX as u64 + (128 << 10);

const PAGES_MAX: u64 = IMAGE_LEN_MAX / PAGE_SIZE as u64;

/// Pages in a row that were touched one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRun {
    pub first: u64,
    pub count: u64,
}

impl TraceRun {
    pub fn pages(&self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

impl From<Range<u64>> for TraceRun {
    fn from(pages: Range<u64>) -> Self {
        Self { first: pages.start, count: pages.end - pages.start }
    }
}

/// What restores of one stream touched, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    pub repository: [u8; 16],
    pub stream: Vec<u8>,
    /// The epoch that was restored last.
    pub epoch: u64,
    /// How many restores it was made of.
    pub restores: u32,
    /// Packs in which the pages lie once more, in this order: they were scattered over many objects.
    pub windows: Vec<[u8; 16]>,
    pub runs: Vec<TraceRun>,
}

impl Trace {
    /// Appends the trace. One with more runs than a trace may have is refused.
    pub fn put(&self, out: &mut Vec<u8>) -> Result<()> {
        check_stream_path(&self.stream)?;
        if self.runs.len() > TRACE_RUNS_MAX
            || self.windows.len() > TRACE_WINDOWS_MAX
            || self.runs.iter().any(|run| !is_sound(run))
        {
            return invalid(WHAT, "it has too many runs, or one that no image has");
        }
        let start = out.len();
        out.put(&MAGIC);
        out.put_u16(TRACE_VERSION);
        out.put(&self.repository);
        out.put_u16(self.stream.len() as u16);
        out.put(&self.stream);
        out.put_u64(self.epoch);
        out.put_u32(self.restores);
        out.put_u8(self.windows.len() as u8);
        self.windows.iter().for_each(|id| out.put(id));
        out.put_u32(self.runs.len() as u32);
        let mut end = 0_u64;
        for run in &self.runs {
            put_number(zigzag(run.first.wrapping_sub(end).cast_signed()), out);
            put_number(run.count, out);
            end = run.first + run.count;
        }
        let check = crc32c::crc32c(&out[start..]);
        out.put_u32(check);
        Ok(())
    }

    /// The trace that these bytes are, of this repository.
    pub fn decode(bytes: &[u8], repository: &[u8; 16]) -> Result<Self> {
        let (body, check) = bytes.split_last_chunk().ok_or(FormatError::Truncated { what: WHAT })?;
        let mut from = Reader::new(WHAT, body);
        if from.array()? != MAGIC {
            return invalid(WHAT, "it is none");
        }
        let version = from.u16()?;
        if version > TRACE_VERSION {
            return Err(FormatError::NewerVersion { what: WHAT, found: version });
        }
        if version != TRACE_VERSION {
            return invalid(WHAT, "it has no version");
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*check) {
            return Err(FormatError::Checksum { what: WHAT });
        }
        if from.array()? != *repository {
            return Err(FormatError::Mismatch { what: WHAT, why: "it is of another repository" });
        }
        let stream = from.medium_bytes()?.to_vec();
        check_stream_path(&stream)?;
        let (epoch, restores, windows) = (from.u64()?, from.u32()?, from.u8()?);
        let windows = (0..windows).map(|_| from.array()).collect::<Result<_>>()?;
        let count = from.u32()? as usize;
        if count > TRACE_RUNS_MAX {
            return invalid(WHAT, "it has too many runs");
        }
        let mut runs = Vec::with_capacity(from.bounded(count, 2)?);
        let mut end = 0_u64;
        for _ in 0..count {
            let first = end.wrapping_add(unzigzag(number(WHAT, &mut from)?).cast_unsigned());
            let run = TraceRun { first, count: number(WHAT, &mut from)? };
            if !is_sound(&run) {
                return invalid(WHAT, "it has a run that no image has");
            }
            end = run.first + run.count;
            runs.push(run);
        }
        from.end()?;
        Ok(Self { repository: *repository, stream, epoch, restores, windows, runs })
    }
}

fn is_sound(run: &TraceRun) -> bool {
    run.count > 0 && run.first < PAGES_MAX && run.count <= PAGES_MAX - run.first
}

fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(runs: &[(u64, u64)]) -> Trace {
        let runs: Vec<TraceRun> = runs.iter().map(|(first, count)| TraceRun { first: *first, count: *count }).collect();
        Trace {
            repository: [7; 16],
            stream: b"memory".to_vec(),
            epoch: 42,
            restores: 3,
            windows: vec![[9; 16]; runs.len() % 3],
            runs,
        }
    }

    #[test]
    fn comes_back_in_any_order_of_pages() {
        for runs in [&[][..], &[(0, 1)], &[(500, 16), (3, 1), (516, 900), (PAGES_MAX - 1, 1), (0, PAGES_MAX)]] {
            let trace = trace(runs);
            let mut bytes = Vec::new();
            trace.put(&mut bytes).unwrap();
            assert_eq!(Trace::decode(&bytes, &[7; 16]).unwrap(), trace);
            assert!(Trace::decode(&bytes, &[8; 16]).is_err());
            for cut in 0..bytes.len() {
                assert!(Trace::decode(&bytes[..cut], &[7; 16]).is_err(), "cut at {cut}");
            }
        }
    }

    #[test]
    fn refuses_what_no_image_has() {
        for runs in [&[(5, 0)][..], &[(PAGES_MAX, 1)], &[(1, PAGES_MAX)], &[(u64::MAX, 1)]] {
            assert!(trace(runs).put(&mut Vec::new()).is_err(), "{runs:?}");
        }
    }

    #[test]
    fn hostile_bytes_under_a_fitting_checksum_are_refused_or_sound() {
        let mut bytes = Vec::new();
        trace(&[(500, 16), (3, 1), (1 << 30, 900)]).put(&mut bytes).unwrap();
        let len = bytes.len() - 4;
        for at in 10..len {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut hostile = bytes[..len].to_vec();
                hostile[at] = value;
                let check = crc32c::crc32c(&hostile);
                hostile.extend_from_slice(&check.to_le_bytes());
                if let Ok(trace) = Trace::decode(&hostile, &[7; 16]) {
                    assert!(trace.runs.iter().all(is_sound));
                }
            }
        }
    }
}
