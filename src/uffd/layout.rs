//! Where the pages of a stream lie in the memory of a VM, as the VM says it.

use std::ops::Range;

use epochfs_format::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const PAGE: u64 = PAGE_SIZE as u64;

/// The size of a huge page. Other sizes than this and a page's are refused.
pub const HUGE: u64 = 2 << 20;

/// So many regions has no VM.
const REGIONS_MAX: usize = 1024;

/// User memory ends here at the latest.
const ADDRESS_END: u64 = 1 << 56;

/// A region of a VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its address in the process of the VM.
    pub start: u64,
    pub len: u64,
    /// Where its content lies in the stream.
    pub offset: u64,
    pub page_size: u64,
}

impl Region {
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The pages of the stream that it holds.
    pub fn pages(&self) -> Range<u64> {
        self.offset / PAGE..(self.offset + self.len) / PAGE
    }

    /// The address of a page of the stream.
    pub fn address(&self, page: u64) -> u64 {
        self.start + (page * PAGE - self.offset)
    }
}

/// A region as Firecracker describes it. What else it says is not needed.
#[derive(Deserialize)]
struct Description {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// In bytes, in spite of its name; from versions that did not have the other.
    page_size_kib: Option<u64>,
}

/// All regions of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// By address.
    regions: Vec<Region>,
}

impl Layout {
    /// Reads what Firecracker sends, and refuses what cannot be: nothing here is to be believed.
    ///
    /// `None` for the beginning of a text whose rest may be on its way.
    pub fn parse(text: &[u8], stream_len: u64) -> Option<Result<Self>> {
        let descriptions: Vec<Description> = match serde_json::from_slice(text) {
            Ok(descriptions) => descriptions,
            Err(error) if error.is_eof() => return None,
            Err(error) => return Some(Err(Error::usage(format!("it describes its memory in no known way: {error}")))),
        };
        let region = |description: &Description| Region {
            start: description.base_host_virt_addr,
            len: description.size,
            offset: description.offset,
            page_size: description.page_size.or(description.page_size_kib).unwrap_or(PAGE),
        };
        Some(Self::new(descriptions.iter().map(region).collect(), stream_len))
    }

    pub fn new(mut regions: Vec<Region>, stream_len: u64) -> Result<Self> {
        if regions.is_empty() {
            return Err(Error::usage("it names no memory"));
        }
        if regions.len() > REGIONS_MAX {
            return Err(Error::usage(format!("it names {} regions of memory, more than any VM has", regions.len())));
        }
        for region in &regions {
            check(region, stream_len)?;
        }
        regions.sort_by_key(|region| region.offset);
        if let Some(both) = regions.windows(2).find(|both| both[0].offset + both[0].len > both[1].offset) {
            return Err(Error::usage(format!("two regions have the same content, at offset {:#x}", both[1].offset)));
        }
        regions.sort_by_key(|region| region.start);
        if let Some(both) = regions.windows(2).find(|both| both[0].end() > both[1].start) {
            return Err(Error::usage(format!("two regions overlap at address {:#x}", both[1].start)));
        }
        Ok(Self { regions })
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub fn len(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The region at this address.
    pub fn at(&self, address: u64) -> Option<&Region> {
        let behind = self.regions.partition_point(|region| region.start <= address);
        let region = &self.regions[behind.checked_sub(1)?];
        (address < region.end()).then_some(region)
    }

    /// The parts of these pages of the stream that the VM has, with their regions.
    pub fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = (&Region, Range<u64>)> {
        self.regions.iter().filter_map(move |region| {
            let own = region.pages();
            let part = own.start.max(pages.start)..own.end.min(pages.end);
            (part.start < part.end).then_some((region, part))
        })
    }

    /// The pages of the stream that lie in these addresses.
    pub fn pages_at(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.regions.iter().filter_map(move |region| {
            let start = addresses.start.max(region.start);
            let end = addresses.end.min(region.end());
            let page = |address: u64| (address - region.start + region.offset) / PAGE;
            // A page of which only a part is removed is not removed.
            (start < end).then(|| page(start.next_multiple_of(PAGE))..page(end))
        })
    }
}

fn check(region: &Region, stream_len: u64) -> Result<()> {
    let Region { start, len, offset, page_size } = *region;
    let refuse = |why: String| Err(Error::usage(format!("the region of {len:#x} bytes at {start:#x}: {why}")));
    if page_size != PAGE && page_size != HUGE {
        return refuse(format!("pages of {page_size} bytes are not supported"));
    }
    if len == 0 || !len.is_multiple_of(page_size) || !start.is_multiple_of(page_size) {
        return refuse(format!("it is not made of whole pages of {page_size} bytes"));
    }
    if !offset.is_multiple_of(PAGE) {
        return refuse(format!("its offset {offset:#x} is not that of a page"));
    }
    if start == 0 || start.checked_add(len).is_none_or(|end| end > ADDRESS_END) {
        return refuse("there is no such memory".to_owned());
    }
    let stream_end = stream_len.div_ceil(page_size).saturating_mul(page_size);
    if offset.checked_add(len).is_none_or(|end| end > stream_end) {
        return refuse(format!("at offset {offset:#x} it ends past the stream's {stream_len:#x} bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn parse(text: &str) -> Option<Result<Layout>> {
        Layout::parse(text.as_bytes(), 4 * GIB)
    }

    #[test]
    fn what_firecracker_sends_is_understood() {
        let text = r#"[{"base_host_virt_addr":140000000000000,"size":3221225472,"offset":0,"page_size":4096,
            "page_size_kib":4096},{"base_host_virt_addr":139000000004096,"size":1073741824,"offset":3221225472,
            "page_size_kib":4096,"something":["else"]}]"#;
        let layout = parse(text).unwrap().unwrap();
        assert_eq!(layout.len(), 4 * GIB);
        let found = layout.at(139_000_000_004_096 + 8191).unwrap();
        assert_eq!((found.offset, found.page_size), (3 * GIB, 4096));
        assert_eq!(found.pages().start, 3 * GIB / 4096);
        assert_eq!(found.address(3 * GIB / 4096 + 2), 139_000_000_004_096 + 8192);
        assert!(layout.at(139_000_000_004_095).is_none() && layout.at(140_000_000_000_000 + 3 * GIB).is_none());
        let parts: Vec<_> = layout.parts(3 * GIB / 4096 - 1..3 * GIB / 4096 + 1).map(|(_, part)| part).collect();
        assert_eq!(parts.len(), 2);
        for end in 0..text.len() - 1 {
            assert!(parse(&text[..end]).is_none(), "{end}");
        }
    }

    #[test]
    fn removed_addresses_are_whole_pages_of_the_stream() {
        let region = |start, offset| Region { start, len: 0x4000, offset, page_size: 4096 };
        let layout = Layout::new(vec![region(0x10000, 0x4000), region(0x14000, 0)], 0x8000).unwrap();
        let pages = |addresses| layout.pages_at(addresses).map(|pages| (pages.start, pages.end)).collect::<Vec<_>>();
        assert_eq!(pages(0x13000..0x15000), [(7, 8), (0, 1)]);
        assert_eq!(pages(0x10000..0x11000), [(4, 5)]);
        assert_eq!(pages(0..0x10000), []);
        assert_eq!(pages(0..u64::MAX), [(4, 8), (0, 4)]);
        assert_eq!(pages(0x10800..0x12800), [(5, 6)]);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let one = |start: u64, size: u64, offset: u64, page: u64| {
            format!(r#"{{"base_host_virt_addr":{start},"size":{size},"offset":{offset},"page_size":{page}}}"#)
        };
        let many: Vec<String> = (0..2000).map(|n| one(0x10000 + n * 4096, 4096, n * 4096, 4096)).collect();
        let wrong = [
            "[]".to_owned(),
            "{}".to_owned(),
            "[1]".to_owned(),
            "hello".to_owned(),
            r#"[{"base_host_virt_addr":-1,"size":1,"offset":0}]"#.to_owned(),
            format!("[{}]", one(0x10000, 100, 0, 4096)),
            format!("[{}]", one(0x10000, 0, 0, 4096)),
            format!("[{}]", one(0x10001, 4096, 0, 4096)),
            format!("[{}]", one(0x10000, 4096, 1, 4096)),
            format!("[{}]", one(0, 4096, 0, 4096)),
            format!("[{}]", one(0x10000, 4096, 0, 0)),
            format!("[{}]", one(0x10000, 8192, 0, 8192)),
            format!("[{}]", one(0x10000, HUGE, 0, HUGE)),
            format!("[{}]", one(0x10000, 4096, 4 * GIB, 4096)),
            format!("[{}]", one(0x10000, 8 * GIB, 0, 4096)),
            format!("[{}]", one(u64::MAX - 4095, 4096, 0, 4096)),
            format!("[{}]", one(0x10000, 4096, u64::MAX - 4095, 4096)),
            format!("[{},{}]", one(0x10000, 8192, 0, 4096), one(0x11000, 4096, 8192, 4096)),
            format!("[{},{}]", one(0x10000, 8192, 0, 4096), one(0x20000, 4096, 4096, 4096)),
            format!("[{}]", many.join(",")),
            "[".repeat(100_000),
        ];
        for text in wrong {
            assert!(parse(&text).unwrap().is_err(), "{}", &text[..text.len().min(200)]);
        }
    }
}
