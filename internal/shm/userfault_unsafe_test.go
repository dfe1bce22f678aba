package shm

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// The parts of <linux/userfaultfd.h> that x/sys lacks.
const (
	uffdAPI             = 0xaa
	uffdUserModeOnly    = 1
	uffdFeatureShmem    = 1 << 5 // UFFD_FEATURE_MISSING_SHMEM
	uffdioAPI           = 0xc018aa3f
	uffdioRegister      = 0xc020aa00
	uffdRegisterMissing = 1
)

// answerless registers memory for faults that nobody answers: whoever touches a page of it that is missing, through these addresses, waits.
func answerless(t *testing.T, mem []byte) (fd int) {
	t.Helper()
	r, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|uffdUserModeOnly, 0, 0)
	if errno != 0 {
		require.Skip(t, "userfaultfd", "userfaultfd: %v", errno)
	}
	api := [3]uint64{uffdAPI, uffdFeatureShmem, 0}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, r, uffdioAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		require.Skip(t, "userfaultfd", "UFFDIO_API: %v", errno)
	}
	reg := [4]uint64{uint64(Addr(mem)), uint64(len(mem)), uffdRegisterMissing, 0}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, r, uffdioRegister, uintptr(unsafe.Pointer(&reg))); errno != 0 {
		t.Fatalf("UFFDIO_REGISTER: %v", errno)
	}
	return int(r)
}

// A front-end that intercepts the faults of its own mapping of the memory (as a VMM does that loads a snapshot) does not intercept those of ours: a userfaultfd
// is told of addresses, not of files.
func TestUserfaultfdOfTheOtherMappingIsNotOurs(t *testing.T) {
	m, fd := shrinking(t) // 8 KiB, no page of which is there
	theirs, err := unix.Mmap(fd, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(theirs)
	defer unix.Close(answerless(t, theirs))
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.Bytes[0]++
		m.Bytes[8191]++
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("a fault in our mapping waits for the other one's userfaultfd")
	}
	if theirs[0] != 1 || theirs[8191] != 1 {
		t.Error("the mappings do not show the same memory")
	}
}

// This is why checkMemoryFile is so strict: a goroutine that waits in a page fault cannot be stopped, and the garbage collector, or GOMAXPROCS, waits for it, and
// everybody else for them. A process of its own shows it, by a copy: Go code at a place where it can be preempted is, since this kind of wait ends for
// the signal. The wait for a page of a file does not.
func TestAPageThatNeverComesStopsTheProcess(t *testing.T) {
	const role = "VHOSTD_TEST_PAGE_NEVER_COMES"
	if os.Getenv(role) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), role+"=1")
		out := &strings.Builder{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case <-ended:
			if strings.Contains(out.String(), "SKIP") {
				require.Skip(t, "userfaultfd", "%s", out)
			}
			t.Errorf("the process went on: files whose pages may never come could be taken after all\n%s", out)
		case <-time.After(3 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
			if !strings.Contains(out.String(), "waiting") {
				t.Errorf("the process did not get to the fault:\n%s", out)
			}
		}
		return
	}
	m, _ := shrinking(t)
	defer unix.Close(answerless(t, m.Bytes))
	go func() {
		var b [4096]byte
		copy(b[:], m.Bytes)
	}()
	time.Sleep(100 * time.Millisecond)
	os.Stdout.WriteString("waiting\n")
	runtime.GC()
}
