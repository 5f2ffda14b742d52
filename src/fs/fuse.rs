//! The adapter: the kernel's requests to [`FileSystem`] and back. The only place that knows the crate `fuser`.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags, PollEvents,
    PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL,
    TimeOrNow, WriteFlags,
};

use super::connect::connect;
use super::names::Rename;
use super::parked::{Parked, ParkingLot};
use super::{Attr, Change, FileSystem, Found, PageCache, errno};
use crate::epoch::live::{Allocation, Answer, Creator, NodeKind, Refusal, SetAttributes};
use crate::error::{Error, Result};
use crate::platform::clock;

/// The largest request that the kernel makes unless its administrator allows more.
const REQUEST_LEN_MAX: u32 = 1 << 20;

/// Requests that the kernel may have on their way without anybody waiting: read-ahead and write-back.
const BACKGROUND_REQUESTS_MAX: u16 = 64;

const FILE_TYPE: u32 = 0o170_000;
const REGULAR_FILE: u32 = 0o100_000;

/// How to mount.
#[derive(Clone, Copy, Debug)]
pub struct MountOptions {
    /// Let users other than the daemon's in, by the files' permissions.
    pub allow_other: bool,
    /// Threads that answer the kernel; 0 for a default.
    pub threads: usize,
    pub read_only: bool,
}

/// A filesystem that is mounted.
pub struct Mount {
    session: Session<Adapter>,
    at: PathBuf,
}

/// Ends a mount from anywhere.
#[derive(Clone, Debug)]
pub struct Unmounter {
    at: PathBuf,
}

/// Threads that answer the kernel. A few more than processors, since some wait for the disk.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(4, usize::from).clamp(2, 16) * 2
}

/// Mounts a filesystem. Nothing is answered before [`Mount::wait`].
pub fn mount(file_system: Arc<FileSystem>, at: &Path, source: &str, options: &MountOptions) -> Result<Mount> {
    let failed = |error| {
        Error::io(format!("cannot mount at {}", at.display()), error)
            .hint("`epochfs doctor` tells whether this host can mount, and what to do if not")
    };
    let at = at.canonicalize().map_err(failed)?;
    let mut config = Config::default();
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(if options.threads == 0 { default_threads() } else { options.threads });
    config.clone_fd = true;
    let pushing = file_system.clone();
    let adapter = Adapter { parked: ParkingLot::start(file_system.clone())?, file_system };
    let device = connect(&at, source, options).map_err(failed)?;
    match Session::from_fd(adapter, device, config.acl, config) {
        Ok(session) => {
            pushing.set_page_cache(Arc::new(KernelCache(session.notifier())));
            Ok(Mount { session, at })
        }
        Err(error) => {
            // What the error says matters more than what becomes of a mount that nobody serves.
            let _ = Unmounter { at: at.clone() }.unmount(true);
            Err(failed(error))
        }
    }
}

impl Mount {
    pub fn unmounter(&self) -> Unmounter {
        Unmounter { at: self.at.clone() }
    }

    /// Answers the kernel until the mount is ended, by anybody.
    pub fn wait(self) -> Result<()> {
        self.session.run().map_err(|error| Error::io(format!("the mount at {} failed", self.at.display()), error))
    }
}

impl Unmounter {
    /// Unmounts: fails while anything is open, unless `lazily`, which takes the name away at once and ends the mount
    /// when nothing is open any more.
    pub fn unmount(&self, lazily: bool) -> Result<()> {
        use rustix::mount::{UnmountFlags, unmount};
        let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        let result = match unmount(&self.at, flags | UnmountFlags::NOFOLLOW) {
            Err(rustix::io::Errno::PERM) => self.by_helper(lazily),
            result => result.map_err(io::Error::from),
        };
        result.map_err(|error| Error::io(format!("cannot unmount {}", self.at.display()), error))
    }

    fn by_helper(&self, lazily: bool) -> io::Result<()> {
        let mut command = Command::new("fusermount3");
        command.arg("-u");
        if lazily {
            command.arg("-z");
        }
        let output = command.arg("--").arg(&self.at).output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let kind = if said.contains("busy") { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
        Err(io::Error::new(kind, said))
    }
}

/// Pushes pages into the kernel's cache. A page that is being read is locked until it was answered: so this is for
/// threads that never answer.
struct KernelCache(Notifier);

impl PageCache for KernelCache {
    fn store(&self, inode: u64, offset: u64, bytes: &[u8]) -> bool {
        match self.0.store(INodeNo(inode), offset, bytes) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "the kernel takes no pages any more");
                false
            }
        }
    }
}

struct Adapter {
    file_system: Arc<FileSystem>,
    parked: ParkingLot,
}

fn number_of(refusal: &Refusal) -> Errno {
    Errno::from_i32(errno(refusal).raw_os_error())
}

fn time_of(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    let time = if ns < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}

fn ns_of(time: TimeOrNow) -> i64 {
    match time {
        TimeOrNow::Now => clock::now_ns().cast_signed(),
        TimeOrNow::SpecificTime(time) => match time.duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
            // The kernel counts nanoseconds up from the second before; fuser takes them off it, like the seconds.
            Err(before) => {
                let before = before.duration();
                let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                seconds.saturating_mul(-1_000_000_000).saturating_add(i64::from(before.subsec_nanos()))
            }
        },
    }
}

fn type_of(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::File => FileType::RegularFile,
        NodeKind::Directory => FileType::Directory,
        NodeKind::Symlink => FileType::Symlink,
    }
}

fn attr_of(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.inode),
        size: attr.length,
        blocks: attr.blocks,
        atime: time_of(attr.accessed_ns),
        mtime: time_of(attr.modified_ns),
        ctime: time_of(attr.changed_ns),
        crtime: UNIX_EPOCH,
        kind: type_of(attr.kind),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.links,
        uid: attr.owner,
        gid: attr.group,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn creator_of(request: &Request, mode: u32) -> Creator {
    Creator { mode: mode & 0o7777, owner: request.uid(), group: request.gid() }
}

fn reply_entry(answer: Answer<Found>, reply: ReplyEntry) {
    match answer {
        Ok(found) => {
            reply.entry_with_ttls(&found.attr_valid, &found.name_valid, &attr_of(&found.attr), Generation(0));
        }
        Err(refusal) => reply.error(number_of(&refusal)),
    }
}

fn reply_empty(answer: Answer<()>, reply: ReplyEmpty) {
    match answer {
        Ok(()) => reply.ok(),
        Err(refusal) => reply.error(number_of(&refusal)),
    }
}

fn reply_extended(bytes: &[u8], size: u32, reply: ReplyXattr) {
    match size {
        0 => reply.size(bytes.len() as u32),
        size if bytes.len() > size as usize => reply.error(Errno::ERANGE),
        _ => reply.data(bytes),
    }
}

thread_local! {
    /// What reads are answered from: made once a thread.
    static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // The kernel offers what it can; the rest goes without.
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_write(REQUEST_LEN_MAX);
        let _ = config.set_max_background(BACKGROUND_REQUESTS_MAX);
        if let Err(most) = config.set_max_readahead(REQUEST_LEN_MAX) {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn destroy(&mut self) {
        self.file_system.end_prefetches();
        self.parked.close();
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        reply_entry(self.file_system.lookup(parent.0, name.as_bytes()), reply);
    }

    fn forget(&self, _request: &Request, ino: INodeNo, nlookup: u64) {
        self.file_system.forget(ino.0, nlookup);
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.file_system.attributes(ino.0) {
            Ok((attr, valid)) => reply.attr(&valid, &attr_of(&attr)),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttributes {
            mode: mode.map(|mode| mode & 0o7777),
            owner: uid,
            group: gid,
            length: size,
            accessed_ns: atime.map(ns_of),
            modified_ns: mtime.map(ns_of),
        };
        let change = Change { set, privileged: request.uid() == 0 };
        match self.file_system.set_attributes(ino.0, &change) {
            Ok((attr, valid)) => reply.attr(&valid, &attr_of(&attr)),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.file_system.read_link(ino.0) {
            Ok(target) => reply.data(&target),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        // Devices, pipes and sockets are no byte images.
        if mode & FILE_TYPE != REGULAR_FILE && mode & FILE_TYPE != 0 {
            return reply.error(Errno::EPERM);
        }
        reply_entry(self.file_system.make_file(parent.0, name.as_bytes(), creator_of(request, mode)), reply);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let creator = creator_of(request, mode);
        if !self.file_system.commits_by_name(parent.0) {
            return reply_entry(self.file_system.make_directory(parent.0, name.as_bytes(), creator), reply);
        }
        // The caller waits until the epoch is durable; this thread has others to answer.
        let (file_system, name) = (self.file_system.clone(), name.to_owned());
        let thread = std::thread::Builder::new().name("commit by mkdir".into());
        // Should there be no thread, the reply is dropped, which answers with an input/output error.
        let _ =
            thread.spawn(move || reply_entry(file_system.make_directory(parent.0, name.as_bytes(), creator), reply));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(self.file_system.unlink(parent.0, name.as_bytes()), reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(self.file_system.remove_directory(parent.0, name.as_bytes()), reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, link_name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (name, target) = (link_name.as_bytes(), target.as_os_str().as_bytes());
        reply_entry(self.file_system.make_symlink(parent.0, name, target, creator_of(request, 0o777)), reply);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let how = if flags.is_empty() {
            Rename::Replace
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            Rename::NoReplace
        } else if flags == RenameFlags::RENAME_EXCHANGE {
            Rename::Exchange
        } else {
            return reply.error(Errno::EINVAL);
        };
        let (from, to) = ((parent.0, name.as_bytes()), (newparent.0, newname.as_bytes()));
        reply_empty(self.file_system.rename(from, to, how), reply);
    }

    fn link(&self, _request: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        // An epoch's file has one path.
        reply.error(Errno::EPERM);
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        match self.file_system.open(ino.0, write) {
            // All changes come through this kernel: what it has cached stays right.
            Ok(handle) => reply.opened(FileHandle(handle), OPENED),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.file_system.create(parent.0, name.as_bytes(), creator_of(request, mode)) {
            Ok((found, handle)) => {
                let attr = attr_of(&found.attr);
                reply.created(&found.name_valid, &attr, Generation(0), FileHandle(handle), OPENED);
            }
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let len = size as usize;
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            match self.file_system.read(fh.0, offset, &mut buffer[..len]) {
                Ok(count) => reply.data(&buffer[..count]),
                Err(refusal) => reply.error(number_of(&refusal)),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let drops_privileges = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let is_write_back = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let written = if is_write_back {
            self.file_system.write_back(fh.0, offset, data)
        } else {
            self.file_system.write(fh.0, offset, data, drops_privileges)
        };
        match written {
            Ok(()) => reply.written(data.len() as u32),
            // Nobody is there to be told that mapped pages have no room: they wait for it.
            Err(Refusal::NoSpace) if is_write_back => {
                let len = data.len() as u32;
                let answer = Box::new(move |answer: Answer<()>| match answer {
                    Ok(()) => reply.written(len),
                    Err(refusal) => reply.error(number_of(&refusal)),
                });
                self.parked.park(Parked { handle: fh.0, offset, data: data.to_vec(), answer });
            }
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        // Closing is no sign of anything: a mapping outlives it.
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.file_system.release(fh.0);
        reply.ok();
    }

    fn fsync(&self, _request: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(self.file_system.sync(ino.0), reply);
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.file_system.open_directory(ino.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn readdir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let answer = self.file_system.read_directory(
            fh.0,
            &mut |next, line| {
                !reply.add(INodeNo(line.inode), next as u64, type_of(line.kind), OsStr::from_bytes(&line.name))
            },
            from,
        );
        match answer {
            Ok(()) => reply.ok(),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn releasedir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.file_system.release(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _request: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(self.file_system.sync(ino.0), reply);
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.file_system.space() {
            Ok(space) => {
                reply.statfs(space.blocks, space.free, space.available, space.files, space.files_free, 4096, 255, 4096);
            }
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        const CREATE: i32 = 1;
        const REPLACE: i32 = 2;
        let exists = match flags {
            CREATE => Some(false),
            REPLACE => Some(true),
            _ => None,
        };
        reply_empty(self.file_system.set_extended(ino.0, name.as_bytes(), Some(value), exists), reply);
    }

    fn getxattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.file_system.get_extended(ino.0, name.as_bytes()) {
            Ok(value) => reply_extended(&value, size, reply),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.file_system.extended(ino.0) {
            Ok(all) => {
                let names: Vec<u8> = all.into_iter().flat_map(|(name, _)| [name, vec![0]].concat()).collect();
                reply_extended(&names, size, reply);
            }
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(self.file_system.set_extended(ino.0, name.as_bytes(), None, Some(true)), reply);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const KEEP_SIZE: i32 = 1;
        const PUNCH_HOLE: i32 = 2;
        const ZERO_RANGE: i32 = 0x10;
        let what = match mode {
            0 => Allocation::Grow,
            KEEP_SIZE => Allocation::Keep,
            mode if mode == PUNCH_HOLE | KEEP_SIZE => Allocation::Zero { grow: false },
            ZERO_RANGE => Allocation::Zero { grow: true },
            mode if mode == ZERO_RANGE | KEEP_SIZE => Allocation::Zero { grow: false },
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let Some(end) = offset.checked_add(length) else { return reply.error(Errno::EFBIG) };
        // The kernel leaves this to us, and does not say who may keep them.
        let drops_privileges = request.uid() != 0;
        reply_empty(self.file_system.allocate(fh.0, offset..end, what, drops_privileges), reply);
    }

    fn lseek(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        const DATA: i32 = 3;
        const HOLE: i32 = 4;
        let Ok(from) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        if whence != DATA && whence != HOLE {
            return reply.error(Errno::EINVAL);
        }
        match self.file_system.seek(fh.0, from, whence == DATA) {
            Ok(Some(found)) => reply.offset(found.cast_signed()),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(refusal) => reply.error(number_of(&refusal)),
        }
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies by itself.
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // The kernel then says that a file can always be read and written, as it does of other file systems'.
        reply.error(Errno::ENOSYS);
    }
}

/// All changes come through this kernel, so what it has cached stays right; closing has nothing to tell.
const OPENED: FopenFlags =
    FopenFlags::FOPEN_KEEP_CACHE.union(FopenFlags::FOPEN_NOFLUSH).union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
