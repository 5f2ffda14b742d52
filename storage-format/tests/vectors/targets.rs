//! Every decoder behind one face: bytes in, a value that can be shown and encoded again out.

use std::sync::LazyLock;

use epochfs_format::{
    BLOCK_HEADER_LEN, Block, BlockKind, Descriptor, Footer, FooterBuilder, HEADER_LEN, Heartbeat, HostOrder, Manifest,
    Node, ObjectRef, PAGE_SIZE, Page, PageDecoder, PageEncoder, Place, Record, Result, StoredNode, TRAILER_LEN,
    Trailer, check_header, decode_node, encode_header, hash_page, put_raw_block,
};

use super::values;

/// A decoded value.
pub trait Value {
    /// All that it says.
    fn view(&self) -> String;
    /// Its encoding, unless it has several.
    fn again(&self) -> Option<Vec<u8>>;
}

/// How checksums get into the bytes of a structure.
#[derive(Clone, Copy)]
pub enum Seal {
    /// There is none: a container has it.
    Open,
    /// A block's kind and codec in the upper and lower half of a byte; its body is the payload.
    Block(u8),
    /// A checksum behind the body.
    Behind,
    /// The descriptor's, within its text.
    Text,
}

impl Seal {
    /// The bytes whose checksum fits, around a body that may be anything.
    pub fn close(self, body: &[u8]) -> Vec<u8> {
        match self {
            Self::Open => body.to_vec(),
            Self::Block(code) => seal_block(code, body),
            Self::Behind => [body, &crc32c::crc32c(body).to_le_bytes()].concat(),
            Self::Text => seal_text(body),
        }
    }

    /// The body within sound bytes.
    pub fn open(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Open => bytes.to_vec(),
            Self::Block(_) => bytes[BLOCK_HEADER_LEN..].to_vec(),
            Self::Behind => bytes[..bytes.len() - 4].to_vec(),
            Self::Text => bytes.to_vec(),
        }
    }
}

/// A block with a checksum that fits.
pub fn seal_block(code: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = ((payload.len() as u32) << 8 | u32::from(code)).to_le_bytes().to_vec();
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes), payload);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn seal_text(text: &[u8]) -> Vec<u8> {
    const FIELD: &[u8] = b"\"checksum\": \"";
    let mut bytes = text.to_vec();
    if let Some(found) = text.windows(FIELD.len()).rposition(|window| window == FIELD) {
        let (start, end) = (found + FIELD.len(), (found + FIELD.len() + 8).min(text.len()));
        let checksum = format!("{:08x}", crc32c::crc32c_append(crc32c::crc32c(&text[..start]), &text[end..]));
        bytes.splice(start..end, checksum.bytes());
    }
    bytes
}

/// A structure with its decoder.
pub struct Target {
    /// The name of its vector.
    pub name: &'static str,
    pub seal: Seal,
    /// A sound example.
    pub bytes: Vec<u8>,
    /// What the example says.
    pub expected: String,
    /// Whether only one encoding of each value is taken.
    pub canonical: bool,
    pub decode: fn(&[u8]) -> Result<Box<dyn Value>>,
}

impl Target {
    /// The file name of its golden vector.
    pub fn file(&self) -> String {
        if self.name.starts_with("epochfs") { format!("{}.json", self.name) } else { format!("{}.bin", self.name) }
    }
}

struct PageValue(Box<Page>);

impl Value for PageValue {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        PageEncoder::new(3).put(&self.0, &mut out);
        Some(out)
    }
}

fn decode_page(bytes: &[u8]) -> Result<Box<dyn Value>> {
    let mut page = Box::new([0; PAGE_SIZE]);
    PageDecoder::new().decode_unproven(Block::only(bytes, BlockKind::Page)?, &mut page)?;
    Ok(Box::new(PageValue(page)))
}

/// As readers do: with the hash that the tree says.
fn decode_proven(bytes: &[u8], proof: &Page) -> Result<Box<dyn Value>> {
    let mut page = Box::new([0; PAGE_SIZE]);
    PageDecoder::new().decode(bytes, &hash_page(proof), &mut page)?;
    Ok(Box::new(PageValue(page)))
}

struct NodeValue {
    own: ObjectRef,
    stored: StoredNode,
}

pub fn view_node(node: &Node) -> String {
    let slots: Vec<_> = node.iter().map(|slot| (slot.slot, *slot.hash, slot.place())).collect();
    format!("level {} objects {:?} slots {slots:?}", node.level(), node.objects())
}

fn view_patch(base: &Place, slots: &[u16], onto_empty: Option<&Node>) -> String {
    format!("base {base:?} slots {slots:?} set {:?}", onto_empty.map(view_node))
}

impl NodeValue {
    /// What a patch sets, which is what it makes of nothing. Nothing comes of one that only empties slots.
    fn onto_empty(&self) -> Option<Node> {
        let StoredNode::Patch(patch) = &self.stored else { return None };
        (0..epochfs_format::LEVELS_MAX).find_map(|level| patch.apply(&Node::empty(level)).ok())
    }
}

impl Value for NodeValue {
    fn view(&self) -> String {
        match &self.stored {
            StoredNode::Whole(node) => view_node(node),
            StoredNode::Patch(patch) => view_patch(&patch.base, &patch.slots(), self.onto_empty().as_ref()),
        }
    }
    fn again(&self) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        match &self.stored {
            StoredNode::Whole(node) => node.put_whole(Some(&self.own), &mut out),
            StoredNode::Patch(patch) => {
                self.onto_empty()?.put_patch(&patch.base, &patch.slots(), Some(&self.own), &mut out)
            }
        };
        Some(out)
    }
}

fn decode_tree_node(bytes: &[u8]) -> Result<Box<dyn Value>> {
    let own = values::pack();
    let stored = decode_node(bytes, &own)?;
    Ok(Box::new(NodeValue { own, stored }))
}

/// What has no more to say than that it is the one asked for.
struct Text(String, Vec<u8>);

impl Value for Text {
    fn view(&self) -> String {
        self.0.clone()
    }
    fn again(&self) -> Option<Vec<u8>> {
        Some(self.1.clone())
    }
}

fn decode_header(bytes: &[u8], object: &ObjectRef) -> Result<Box<dyn Value>> {
    check_header(bytes, &values::REPOSITORY, object)?;
    Ok(Box::new(Text(format!("{object:?}"), encode_header(&values::REPOSITORY, object).to_vec())))
}

/// The object that trailers and footers are said to be of.
static OBJECT: LazyLock<Vec<u8>> = LazyLock::new(values::record_bytes);

struct TrailerValue(Trailer);

impl Value for TrailerValue {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        let trailer = &self.0;
        let mut body = b"EPOCHEND".to_vec();
        for field in [trailer.footer_offset, trailer.footer_len, trailer.record_offset, trailer.record_len, 1] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        Some(Seal::Behind.close(&body))
    }
}

fn decode_trailer(bytes: &[u8]) -> Result<Box<dyn Value>> {
    Ok(Box::new(TrailerValue(Trailer::decode(bytes, OBJECT.len() as u64)?)))
}

struct FooterValue(Footer);

impl Value for FooterValue {
    fn view(&self) -> String {
        format!("{:?}", self.0.iter().collect::<Vec<_>>())
    }
    fn again(&self) -> Option<Vec<u8>> {
        let mut builder = FooterBuilder::new();
        for entry in self.0.iter() {
            assert_eq!(builder.push(entry.kind, entry.hash, entry.len), entry.offset);
            assert_eq!(self.0.find(entry.offset), Some(entry));
        }
        let mut bytes = builder.finish();
        bytes.truncate(bytes.len() - TRAILER_LEN);
        Some(bytes)
    }
}

fn decode_footer(bytes: &[u8]) -> Result<Box<dyn Value>> {
    let trailer = Trailer::decode(&OBJECT, OBJECT.len() as u64)?;
    Ok(Box::new(FooterValue(trailer.decode_footer(bytes)?)))
}

struct RecordValue(Record);

impl Value for RecordValue {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        self.0.check().expect("what was decoded may be encoded");
        let mut out = Vec::new();
        self.0.put_block(Some(&values::record_object()), &mut out);
        Some(out)
    }
}

fn decode_record(bytes: &[u8]) -> Result<Box<dyn Value>> {
    let (record, _) = Record::decode_block(bytes, values::MACHINE, values::SEQ)?;
    Ok(Box::new(RecordValue(record)))
}

struct ManifestValue(Manifest, Option<ObjectRef>);

impl Value for ManifestValue {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        assert_eq!(Manifest::new(self.0.entries().to_vec()).as_ref(), Ok(&self.0), "what was decoded is allowed");
        Some(self.0.encode(self.1.as_ref()))
    }
}

fn decode_manifest(bytes: &[u8]) -> Result<Box<dyn Value>> {
    Ok(Box::new(ManifestValue(Manifest::decode(bytes, None)?, None)))
}

struct DescriptorValue(Descriptor);

impl Value for DescriptorValue {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        Some(self.0.encode())
    }
}

struct HeartbeatValue(Heartbeat);

impl Value for HeartbeatValue {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        Some(self.0.encode())
    }
}

struct HostOrderValue(HostOrder);

impl Value for HostOrderValue {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        Some(self.0.encode())
    }
}

/// An object with all its blocks, each proven against what the footer says about it.
fn decode_object(bytes: &[u8], object: &ObjectRef) -> Result<Box<dyn Value>> {
    let mut text = String::new();
    check_header(bytes, &values::REPOSITORY, object)?;
    let trailer = Trailer::decode(bytes, bytes.len() as u64)?;
    let footer = trailer.decode_footer(&bytes[trailer.footer_offset as usize..bytes.len() - TRAILER_LEN])?;
    let mut page = [0; PAGE_SIZE];
    for entry in footer.iter() {
        let block = &bytes[entry.offset as usize..(entry.offset + entry.len) as usize];
        text += &format!("{entry:?}\n");
        match entry.kind {
            BlockKind::Page => PageDecoder::new().decode(block, &entry.hash, &mut page)?,
            // As in packs, whose blocks record objects take over: relative to whatever the object is.
            BlockKind::Node | BlockKind::Patch => drop(decode_node(block, object)?),
            BlockKind::Record => text += &decode_record(block)?.view(),
            BlockKind::Footer => unreachable!("a footer lists no footer"),
        }
    }
    Ok(Box::new(Text(text, bytes.to_vec())))
}

fn target(
    name: &'static str,
    seal: Seal,
    bytes: Vec<u8>,
    expected: String,
    decode: fn(&[u8]) -> Result<Box<dyn Value>>,
) -> Target {
    Target { name, seal, bytes, expected, canonical: true, decode }
}

/// Every structure with a golden vector.
pub fn targets() -> Vec<Target> {
    let own = values::pack();
    let mut all = Vec::new();

    let mut bytes = Vec::new();
    PageEncoder::new(1).put(&values::noise_page(), &mut bytes);
    let view = format!("{:?}", values::noise_page());
    all.push(target("page-raw", Seal::Block(0x10), bytes.clone(), view.clone(), |bytes| {
        decode_proven(bytes, &values::noise_page())
    }));
    let mut text = Vec::new();
    PageEncoder::new(1).put(&values::text_page(), &mut text);
    let view = format!("{:?}", values::text_page());
    all.push(Target {
        canonical: false,
        ..target("page-zstd", Seal::Block(0x11), text, view, |bytes| decode_proven(bytes, &values::text_page()))
    });

    for (name, node) in [("node-leaf", values::leaf()), ("node-inner", values::inner())] {
        let mut bytes = Vec::new();
        node.put_whole(Some(&own), &mut bytes);
        all.push(target(name, Seal::Block(0x20), bytes, view_node(&node), decode_tree_node));
    }
    let mut bytes = Vec::new();
    let base = values::patch_base();
    values::patched().put_patch(&base, &values::PATCH_SLOTS, Some(&own), &mut bytes);
    let mut set = epochfs_format::NodeEditor::new(0);
    for slot in values::PATCH_SLOTS.map(usize::from) {
        if let (Some(hash), Some(place)) = (values::patched().hash(slot), values::patched().place(slot)) {
            set.set(slot, *hash, &place);
        }
    }
    let view = view_patch(&base, &values::PATCH_SLOTS, Some(&set.finish()));
    all.push(target("patch", Seal::Block(0x30), bytes, view, decode_tree_node));

    let header = encode_header(&values::REPOSITORY, &own).to_vec();
    assert_eq!(header.len(), HEADER_LEN);
    all.push(target("header-pack", Seal::Behind, header, format!("{own:?}"), |bytes| {
        decode_header(bytes, &values::pack())
    }));
    let object = values::record_object();
    let header = encode_header(&values::REPOSITORY, &object).to_vec();
    all.push(target("header-record", Seal::Behind, header, format!("{object:?}"), |bytes| {
        decode_header(bytes, &values::record_object())
    }));

    for (name, record) in values::records() {
        let mut bytes = Vec::new();
        record.put_block(Some(&object), &mut bytes);
        all.push(target(name, Seal::Block(0x40), bytes, format!("{record:?}"), decode_record));
    }

    let manifest = values::manifest(own);
    all.push(target("manifest", Seal::Open, manifest.encode(None), format!("{manifest:?}"), decode_manifest));

    let descriptor = values::descriptor();
    all.push(target("epochfs", Seal::Text, descriptor.encode(), format!("{descriptor:?}"), |bytes| {
        Ok(Box::new(DescriptorValue(Descriptor::decode(bytes)?)))
    }));

    let sealed = values::sealed_descriptor();
    all.push(target("epochfs-sealed", Seal::Text, sealed.encode(), format!("{sealed:?}"), |bytes| {
        Ok(Box::new(DescriptorValue(Descriptor::decode(bytes)?)))
    }));

    let heartbeat = values::heartbeat();
    all.push(target("heartbeat", Seal::Behind, heartbeat.encode(), format!("{heartbeat:?}"), |bytes| {
        Ok(Box::new(HeartbeatValue(Heartbeat::decode(bytes, &values::REPOSITORY)?)))
    }));
    let order = values::host_order();
    all.push(target("host-order", Seal::Behind, order.encode(), format!("{order:?}"), |bytes| {
        Ok(Box::new(HostOrderValue(HostOrder::decode(bytes, &values::REPOSITORY)?)))
    }));
    all
}

/// Whole objects: their blocks' golden bytes include zstd's, so that they are read and not written again.
pub fn objects() -> Vec<Target> {
    vec![
        Target {
            canonical: false,
            ..target("pack", Seal::Open, values::pack_bytes(), String::new(), |bytes| {
                decode_object(bytes, &values::pack())
            })
        },
        Target {
            canonical: false,
            ..target("record-object", Seal::Open, values::record_bytes(), String::new(), |bytes| {
                decode_object(bytes, &values::record_object())
            })
        },
    ]
}

/// Parts of objects that have no vector of their own, and the page decoder without a hash to compare with.
pub fn parts() -> Vec<Target> {
    let object = values::record_bytes();
    let trailer = Trailer::decode(&object, object.len() as u64).expect("the golden object is sound");
    let start = object.len() - TRAILER_LEN;
    let footer = object[trailer.footer_offset as usize..start].to_vec();
    let mut raw = Vec::new();
    put_raw_block(BlockKind::Page, &values::noise_page(), &mut raw);
    let mut zstd = Vec::new();
    PageEncoder::new(1).put(&values::text_page(), &mut zstd);
    let view = |decode: fn(&[u8]) -> Result<Box<dyn Value>>, bytes: &[u8]| decode(bytes).expect("it is sound").view();
    vec![
        target("trailer", Seal::Behind, object[start..].to_vec(), format!("{trailer:?}"), decode_trailer),
        target("footer", Seal::Block(0x50), footer.clone(), view(decode_footer, &footer), decode_footer),
        Target {
            canonical: false,
            ..target("page-unproven", Seal::Block(0x10), raw.clone(), view(decode_page, &raw), decode_page)
        },
        Target {
            canonical: false,
            ..target("page-zstd-unproven", Seal::Block(0x11), zstd.clone(), view(decode_page, &zstd), decode_page)
        },
    ]
}
