//! Opening a userfaultfd: three ways, tried in order, each failure kept with its remedy.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::uapi::{self, UFFD_API, UFFD_USER_MODE_ONLY, USERFAULTFD_IOC_NEW, UffdioApi};
use super::{Features, Ioctls, Userfault};

/// Names a way to open a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpenWay {
    /// An ioctl of `/dev/userfaultfd`: whoever may open that file (Linux 6.1).
    Device,
    /// userfaultfd(2): with `CAP_SYS_PTRACE`, or with the sysctl `vm.unprivileged_userfaultfd` at 1.
    Syscall,
    /// userfaultfd(2) with `UFFD_USER_MODE_ONLY`: anybody (Linux 5.11).
    UserModeOnly,
}

/// The ways, the most capable and least privileged first.
pub(crate) const DEFAULT_WAYS: [OpenWay; 3] = [OpenWay::Device, OpenWay::Syscall, OpenWay::UserModeOnly];

impl OpenWay {
    /// Tells whether faults that the kernel itself takes are served too, as in a read(2) into a missing page.
    ///
    /// Where they are not, such a system call answers `EFAULT`.
    pub const fn serves_kernel_faults(self) -> bool {
        !matches!(self, OpenWay::UserModeOnly)
    }
}

impl fmt::Display for OpenWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OpenWay::Device => "/dev/userfaultfd",
            OpenWay::Syscall => "userfaultfd(2)",
            OpenWay::UserModeOnly => "userfaultfd(2), user mode only",
        })
    }
}

/// Names the step at which an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpenStep {
    /// Getting a descriptor.
    Descriptor,
    /// The handshake on it, which asks for features.
    Handshake,
}

/// Records one failed attempt; its `Display` names the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenAttempt {
    /// The way that was tried.
    pub way: OpenWay,
    /// The step that failed.
    pub step: OpenStep,
    /// The kernel's answer.
    pub errno: Errno,
    /// The features that were asked for and that the kernel does not have.
    pub missing: Features,
}

impl fmt::Display for OpenAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.way, self.errno)?;
        if !self.missing.is_empty() {
            write!(f, " (the kernel does not offer {}", self.missing)?;
            for known in self.missing.named() {
                write!(f, "; {} needs Linux {}", known.name, known.since)?;
            }
            return f.write_str(")");
        }
        f.write_str(match (self.step, self.way, self.errno) {
            (_, _, Errno::EMFILE) => " (raise RLIMIT_NOFILE, `ulimit -n`)",
            (_, _, Errno::ENFILE) => " (raise the sysctl fs.file-max)",
            (OpenStep::Handshake, _, Errno::EPERM) => " (EVENT_FORK needs CAP_SYS_PTRACE)",
            (OpenStep::Handshake, ..) => "",
            (_, OpenWay::Device, Errno::EACCES | Errno::EPERM) => {
                " (grant read and write on /dev/userfaultfd by chmod, chgrp or `setfacl -m u:NAME:rw`; a container must also allow the device)"
            }
            (_, OpenWay::Device, Errno::ENOENT | Errno::ENXIO | Errno::ENODEV) => {
                " (the device needs Linux 6.1, and a container must be given it)"
            }
            (_, _, Errno::ENOSYS) => {
                " (the kernel is built without CONFIG_USERFAULTFD, or a seccomp policy hides the call)"
            }
            (_, OpenWay::Syscall, Errno::EPERM) => {
                " (set the sysctl vm.unprivileged_userfaultfd=1 or grant CAP_SYS_PTRACE; a seccomp policy may forbid the call too)"
            }
            (_, OpenWay::UserModeOnly, Errno::EINVAL) => " (UFFD_USER_MODE_ONLY needs Linux 5.11)",
            (_, OpenWay::UserModeOnly, Errno::EPERM) => {
                " (a seccomp or security policy forbids the call: allow userfaultfd in it)"
            }
            _ => "",
        })
    }
}

/// Tells why no userfaultfd could be opened: every attempt, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFailure {
    /// The attempts; empty only when no way was allowed.
    pub attempts: Vec<OpenAttempt>,
}

impl OpenFailure {
    /// Returns the errno of the last attempt, or `EINVAL` when no way was allowed.
    pub fn errno(&self) -> Errno {
        self.attempts.last().map_or(Errno::EINVAL, |attempt| attempt.errno)
    }
}

impl fmt::Display for OpenFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no userfaultfd could be opened")?;
        if self.attempts.is_empty() {
            return f.write_str(": no way of opening one was allowed");
        }
        for (index, attempt) in self.attempts.iter().enumerate() {
            write!(f, "{}{attempt}", if index == 0 { ": " } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for OpenFailure {}

/// Opens userfaultfds, always by the same list of ways.
///
/// It holds `/dev/userfaultfd` open if that could be had, so that descriptors made later come from it too: after
/// dropping privileges, and in forked children. The kernel ties a userfaultfd to the process that asks, whoever opened
/// the device.
#[derive(Debug)]
pub(crate) struct Opener {
    ways: Vec<OpenWay>,
    device: Option<OwnedFd>,
}

/// A userfaultfd after its handshake.
pub(super) struct Opened {
    pub(super) userfault: Userfault,
    /// All features of the kernel, enabled or not.
    pub(super) features: Features,
    pub(super) ioctls: Ioctls,
}

impl Opener {
    /// Makes an opener that tries `ways` in the order given.
    pub(crate) fn new(ways: &[OpenWay]) -> Opener {
        let device = if ways.contains(&OpenWay::Device) { open_device().ok() } else { None };
        Opener { ways: ways.to_vec(), device }
    }

    /// Opens a userfaultfd with `features` enabled, non-blocking and closed on exec; returns the way that worked.
    pub(crate) fn open(&self, features: Features) -> Result<(Userfault, OpenWay), OpenFailure> {
        let (opened, way, _) = self.first(features)?;
        Ok((opened.userfault, way))
    }

    /// Returns the features that the kernel has, by the first way that works.
    pub(crate) fn available(&self) -> Result<Features, OpenFailure> {
        self.first(Features::empty()).map(|(opened, ..)| opened.features)
    }

    /// Opens by the first way that works; returns also the attempts that failed before it.
    pub(super) fn first(&self, features: Features) -> Result<(Opened, OpenWay, Vec<OpenAttempt>), OpenFailure> {
        let mut attempts = Vec::new();
        for &way in &self.ways {
            match self.attempt(way, features) {
                Ok(opened) => return Ok((opened, way, attempts)),
                Err(attempt) => {
                    // A shortage of descriptors is not the way's fault, and no other way mends it.
                    let ends = matches!(attempt.errno, Errno::EMFILE | Errno::ENFILE);
                    attempts.push(attempt);
                    if ends {
                        break;
                    }
                }
            }
        }
        Err(OpenFailure { attempts })
    }

    /// Tries one way.
    fn attempt(&self, way: OpenWay, features: Features) -> Result<Opened, OpenAttempt> {
        let fd = self.descriptor(way).map_err(|errno| OpenAttempt {
            way,
            step: OpenStep::Descriptor,
            errno,
            missing: Features::empty(),
        })?;
        let userfault = Userfault::from(fd);
        match handshake(&userfault, features) {
            Ok((features, ioctls)) => Ok(Opened { userfault, features, ioctls }),
            Err(errno) => {
                // A refused handshake leaves the descriptor as it was, so it can still be asked what there is.
                let offered = handshake(&userfault, Features::empty());
                let missing = offered.map_or(Features::empty(), |(offered, _)| features.difference(offered));
                Err(OpenAttempt { way, step: OpenStep::Handshake, errno, missing })
            }
        }
    }

    /// Gets a descriptor, without a handshake.
    fn descriptor(&self, way: OpenWay) -> Result<OwnedFd, Errno> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        match (way, &self.device) {
            (OpenWay::Device, Some(device)) => device_new(device, flags),
            // It could not be had before; ask again, for the errno of now.
            (OpenWay::Device, None) => device_new(&open_device()?, flags),
            (OpenWay::Syscall, _) => userfaultfd(flags),
            (OpenWay::UserModeOnly, _) => userfaultfd(flags | UFFD_USER_MODE_ONLY),
        }
    }
}

/// Opens the device.
fn open_device() -> Result<OwnedFd, Errno> {
    nix::fcntl::open("/dev/userfaultfd", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
}

/// Asks the device for a userfaultfd of this process.
fn device_new(device: &OwnedFd, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: the argument of this request is a number; the kernel touches no memory of ours.
    let fd = Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks the kernel for a userfaultfd of this process.
pub(super) fn userfaultfd(flags: libc::c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes a number and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it; descriptors fit an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Does the handshake, which succeeds once per descriptor; returns what the kernel has, not only what was asked for.
pub(super) fn handshake(userfault: &Userfault, features: Features) -> Result<(Features, Ioctls), Errno> {
    let mut request = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: the request names no memory.
    unsafe { uapi::ioctl(userfault.as_fd(), &mut request) }?;
    Ok((Features::from_bits(request.features), Ioctls::from_bits(request.ioctls)))
}

#[cfg(test)]
mod tests {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    use super::*;
    use crate::sys::testing::alone;

    fn refuse(way: OpenWay, step: OpenStep, errno: Errno) -> OpenAttempt {
        OpenAttempt { way, step, errno, missing: Features::empty() }
    }

    /// T86: a wrong version is refused, and leaves the descriptor good for the right one, once.
    #[test]
    fn a_handshake_checks_the_version_and_happens_once() {
        let userfault = Userfault::from(userfaultfd(UFFD_USER_MODE_ONLY).expect("userfaultfd"));
        let mut request = UffdioApi { api: 0xAB, features: 0, ioctls: 0 };
        // SAFETY: the request names no memory.
        assert_eq!(unsafe { uapi::ioctl(userfault.as_fd(), &mut request) }, Err(Errno::EINVAL));
        assert_eq!(handshake(&userfault, Features::from_bits(1 << 63)), Err(Errno::EINVAL));
        let (features, ioctls) = handshake(&userfault, Features::empty()).expect("handshake");
        assert!(features.contains(Features::MISSING_SHMEM | Features::EVENT_UNMAP), "{features}");
        assert!(ioctls.contains(Ioctls::API | Ioctls::REGISTER | Ioctls::UNREGISTER), "{ioctls}");
        assert_eq!(handshake(&userfault, Features::empty()), Err(Errno::EINVAL));
    }

    /// T86: a feature that the kernel does not have is named, with every way that was tried.
    #[test]
    fn a_feature_that_is_not_offered_is_named() {
        let unknown = Features::from_bits(1 << 63);
        let failure = Opener::new(&[OpenWay::UserModeOnly]).open(unknown | Features::EVENT_UNMAP).expect_err("bit 63");
        let expected = OpenAttempt {
            way: OpenWay::UserModeOnly,
            step: OpenStep::Handshake,
            errno: Errno::EINVAL,
            missing: unknown,
        };
        assert_eq!(failure.attempts, [expected]);
        assert_eq!(failure.errno(), Errno::EINVAL);
        let text = failure.to_string();
        assert!(text.contains("the kernel does not offer 0x8000000000000000"), "{text}");

        let failure = Opener::new(&DEFAULT_WAYS).open(unknown).expect_err("bit 63");
        assert_eq!(failure.attempts.iter().map(|attempt| attempt.way).collect::<Vec<_>>(), DEFAULT_WAYS);
    }

    #[test]
    fn a_missing_feature_says_which_linux_has_it() {
        let mut attempt = refuse(OpenWay::Syscall, OpenStep::Handshake, Errno::EINVAL);
        attempt.missing = Features::POISON | Features::THREAD_ID;
        let text = attempt.to_string();
        assert!(text.contains("THREAD_ID needs Linux 4.14") && text.contains("POISON needs Linux 6.6"), "{text}");
    }

    /// T86: the ways are tried in the order given, and the first that works is taken.
    #[test]
    fn the_first_way_that_works_is_taken() {
        let works: Vec<OpenWay> =
            DEFAULT_WAYS.into_iter().filter(|way| Opener::new(&[*way]).open(Features::empty()).is_ok()).collect();
        assert!(works.contains(&OpenWay::UserModeOnly), "anybody may serve their own faults");
        if works.len() < 3 {
            eprintln!("skipped in part, because this process may only open by {works:?}");
        }
        let mut reversed = DEFAULT_WAYS;
        reversed.reverse();
        for ways in [DEFAULT_WAYS, reversed] {
            let first = ways.iter().position(|way| works.contains(way)).expect("one works");
            let (_, way, failed) = Opener::new(&ways).first(Features::empty()).expect("one works");
            assert_eq!(way, ways[first]);
            assert_eq!(failed.iter().map(|attempt| attempt.way).collect::<Vec<_>>(), ways[..first]);
        }
        let failure = Opener::new(&[]).open(Features::empty()).expect_err("no way");
        assert_eq!((failure.attempts.len(), failure.errno()), (0, Errno::EINVAL));
    }

    /// Each way's usual refusal names its own knob.
    #[test]
    fn each_refusal_names_its_knob() {
        use OpenStep::{Descriptor, Handshake};
        use OpenWay::{Device, Syscall, UserModeOnly};
        let table = [
            (Device, Descriptor, Errno::EACCES, "setfacl"),
            (Device, Descriptor, Errno::ENOENT, "Linux 6.1"),
            (Syscall, Descriptor, Errno::EPERM, "vm.unprivileged_userfaultfd=1"),
            (Syscall, Descriptor, Errno::EPERM, "CAP_SYS_PTRACE"),
            (Syscall, Descriptor, Errno::ENOSYS, "CONFIG_USERFAULTFD"),
            (UserModeOnly, Descriptor, Errno::EINVAL, "Linux 5.11"),
            (UserModeOnly, Descriptor, Errno::EPERM, "seccomp"),
            (UserModeOnly, Descriptor, Errno::EMFILE, "ulimit -n"),
            (UserModeOnly, Handshake, Errno::EPERM, "EVENT_FORK needs CAP_SYS_PTRACE"),
        ];
        for (way, step, errno, knob) in table {
            let failure = OpenFailure { attempts: vec![refuse(way, step, errno)] };
            let text = failure.to_string();
            assert!(text.contains(knob) && text.contains(&way.to_string()), "{text}");
            assert_eq!(failure.errno(), errno);
        }
    }

    /// A shortage of descriptors ends the search: no other way would mend it.
    #[test]
    fn a_shortage_of_descriptors_ends_the_search() {
        if !alone(module_path!(), "a_shortage_of_descriptors_ends_the_search") {
            return;
        }
        let opener = Opener::new(&[OpenWay::UserModeOnly, OpenWay::Syscall, OpenWay::Device]);
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
        setrlimit(Resource::RLIMIT_NOFILE, 0, hard).expect("setrlimit");
        let failure = opener.open(Features::empty()).expect_err("no descriptor is left");
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("setrlimit");
        assert_eq!(failure.attempts, [refuse(OpenWay::UserModeOnly, OpenStep::Descriptor, Errno::EMFILE)]);
        assert!(opener.open(Features::empty()).is_ok());
    }

    /// T112: an opener made with privileges keeps the device after they are dropped.
    #[test]
    fn the_device_survives_dropping_privileges() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped, because only root has privileges to drop");
            return;
        }
        if !alone(module_path!(), "the_device_survives_dropping_privileges") {
            return;
        }
        let opener = Opener::new(&DEFAULT_WAYS);
        if opener.device.is_none() {
            eprintln!("skipped, because there is no /dev/userfaultfd");
            return;
        }
        nix::unistd::setgroups(&[]).expect("setgroups");
        nix::unistd::setuid(nix::unistd::Uid::from_raw(65534)).expect("setuid");
        let (_, way) = opener.open(Features::empty()).expect("the device is held open");
        assert_eq!(way, OpenWay::Device);
    }
}
