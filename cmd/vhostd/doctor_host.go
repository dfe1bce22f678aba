package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/confine"
)

// What doctor asks for.
const (
	minKernelMajor, minKernelMinor = 5, 4
	usoKernelMajor, usoKernelMinor = 6, 2
	wantFiles                      = 1024 // open files: a guest takes about ten and two for each queue
	qemuTimeout                    = 10 * time.Second
)

func checkKernel() []finding {
	f := finding{What: "kernel"}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return one(f, err, verdictWarn)
	}
	f.Detail = unix.ByteSliceToString(u.Release[:])
	major, minor := versionOf(f.Detail)
	switch {
	case !atLeast(major, minor, minKernelMajor, minKernelMinor):
		f.Verdict = verdictWarn
		f.Meaning = fmt.Sprintf("older than %d.%d, with which vhostd is not tested", minKernelMajor, minKernelMinor)
		f.Fix = "update the kernel"
	case !atLeast(major, minor, usoKernelMajor, usoKernelMinor):
		f.Verdict = verdictOK
		f.Meaning = fmt.Sprintf("a tap has no UDP segmentation offload before %d.%d: vhostd cuts those frames itself", usoKernelMajor, usoKernelMinor)
	default:
		f.Verdict = verdictOK
	}
	return []finding{f}
}

var dotted = regexp.MustCompile(`(\d+)\.(\d+)`)

// versionOf reads the first two numbers of a version; 0.0 if there are none.
func versionOf(s string) (major, minor int) {
	m := dotted.FindStringSubmatch(s)
	if m == nil {
		return 0, 0
	}
	major, _ = strconv.Atoi(m[1])
	minor, _ = strconv.Atoi(m[2])
	return major, minor
}

func atLeast(major, minor, wantMajor, wantMinor int) bool {
	return major > wantMajor || major == wantMajor && minor >= wantMinor
}

func checkMemfd() []finding {
	f := finding{
		What: "memfd", Detail: "can be made and sealed",
		Meaning: "guest memory is shared through it",
		Fix:     "allow memfd_create(2) in the container's seccomp profile",
	}
	fd, err := unix.MemfdCreate("vhostd-doctor", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return one(f, fmt.Errorf("memfd_create: %w", err), verdictFail)
	}
	defer unix.Close(fd)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
	return one(f, err, verdictWarn)
}

func checkFiles() []finding {
	f := finding{What: "open files"}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return one(f, err, verdictWarn)
	}
	f.Verdict, f.Detail = verdictOK, fmt.Sprintf("at most %s", limit(l.Cur, ""))
	if l.Cur < wantFiles {
		f.Verdict = verdictWarn
		f.Meaning = "each queue of a guest takes some descriptors, each forwarded connection one"
		f.Fix = fmt.Sprintf("ulimit -n %d, or LimitNOFILE=%d in the systemd unit", wantFiles, wantFiles)
	}
	return []finding{f}
}

func limit(n uint64, unit string) string {
	if n == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", n, unit))
}

// qemuNames are what QEMU is called, on this architecture.
func qemuNames() []string {
	arch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	return []string{"qemu-system-" + arch, "qemu-kvm", "/usr/libexec/qemu-kvm"}
}

func checkQEMU() []finding {
	f := finding{What: "QEMU"}
	for _, name := range qemuNames() {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), qemuTimeout)
		defer cancel()
		out, err := exec.CommandContext(ctx, path, "--version").Output()
		if err != nil {
			return one(f, fmt.Errorf("%s --version: %w", path, err), verdictWarn)
		}
		first, _, _ := strings.Cut(string(out), "\n")
		f.Verdict, f.Detail = verdictOK, fmt.Sprintf("%s (%s)", first, path)
		if major, minor := versionOf(first); !atLeast(major, minor, 8, 0) && !canUseKVM() {
			f.Verdict = verdictWarn
			f.Meaning = "QEMU 7.2 without KVM crashes when a vhost-user device uses MSI-X"
			f.Fix = "add vectors=0 to -device virtio-net-pci, or use KVM"
		}
		return []finding{f}
	}
	f.Verdict, f.Detail = verdictWarn, "not found"
	f.Meaning = "another VMM with vhost-user will do"
	f.Fix = "apt-get install qemu-system, or dnf install qemu-kvm"
	return []finding{f}
}

const kvmPath = "/dev/kvm"

func canUseKVM() bool { return openKVM() == nil }

func openKVM() error {
	f, err := os.OpenFile(kvmPath, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func checkKVM() []finding {
	f := finding{What: "KVM", Detail: kvmPath + " opens", Meaning: "", Fix: "sudo usermod -aG kvm $USER, and log in again"}
	err := openKVM()
	if err != nil {
		f.Meaning = "guests of this user are emulated, which is slow; vhostd itself does not need it"
	}
	if errors.Is(err, os.ErrNotExist) {
		f.Fix = "enable virtualization in the firmware (or nested virtualization in the host's hypervisor); sudo modprobe kvm-intel or kvm-amd"
	}
	return one(f, err, verdictWarn)
}

// The versions of Landlock with which it restricts what opens a file, all that Linux 6.12 can, and all that vhostd asks of it.
const (
	landlockFiles  = 3
	landlockScopes = 6
	landlockAll    = 9
)

// landlockMeaning is what follows from a version.
func landlockMeaning(version int) string {
	switch {
	case version < landlockFiles:
		return "files are restricted, their truncation (Linux 6.2) and TCP (6.7) are not"
	case version < landlockScopes:
		return "files are restricted; TCP needs Linux 6.7, devices' ioctl 6.10, abstract UNIX sockets 6.12"
	case version < landlockAll:
		return fmt.Sprintf("vhostd opens no files but those that it needs; that it connects to no other UNIX sockets takes version %d", landlockAll)
	}
	return "vhostd opens no files but those that it needs"
}

// checkConfinement looks at what vhostd can have taken from itself once it is started.
func checkConfinement() []finding {
	s := confine.Supported()
	calls := finding{What: "seccomp filters", Verdict: verdictOK, Detail: "available", Meaning: "vhostd makes no system calls but those that it needs"}
	if !s.Seccomp {
		calls.Verdict, calls.Detail = verdictWarn, "not available"
		calls.Meaning = "vhostd runs without: whoever finds a fault in it may try all of the kernel's system calls"
		calls.Fix = "a kernel with CONFIG_SECCOMP_FILTER, or a container whose profile lets seccomp(2) pass"
	}
	files := finding{What: "Landlock", Verdict: verdictOK, Detail: fmt.Sprintf("version %d", s.Landlock), Meaning: landlockMeaning(s.Landlock)}
	if s.LandlockErr != nil {
		files.Verdict, files.Detail = verdictWarn, s.LandlockErr.Error()
		files.Meaning = "vhostd runs without: whoever finds a fault in it can open what its user can, as far as seccomp lets him"
		files.Fix = "Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and landlock in the lsm= of the kernel's command line"
	}
	return []finding{calls, files}
}
