package uring

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sys"
)

// anonymous is memory outside Go's heap, zeroed.
func anonymous(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// seqpacket is a pair of sockets that keep the borders of writes, and do not wait.
func seqpacket(t *testing.T) (near, far int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return fds[0], fds[1]
}

// TestWrites: writes of all kinds are done, in order, when Submit returns, and their completions are there.
func TestWrites(t *testing.T) {
	r := newRing(t, 8, 64)
	mem := anonymous(t, 1<<16)
	for i := range mem {
		mem[i] = byte(i >> 4)
	}
	if err := r.SetBuffers([][]byte{mem[:4096], mem[4096:]}); err != nil {
		t.Fatal(err)
	}
	near, far := seqpacket(t)
	iov := func(b ...[]byte) (v []unix.Iovec) {
		for _, b := range b {
			v = append(v, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
		}
		return v
	}
	vectored := r.VectoredFixed()
	got := make([]byte, 1<<16)
	for round := range 100 {
		free, inOne := [][]byte{[]byte("head"), mem[100:5000]}, [][]byte{mem[5000:5004], mem[9000:9100]}
		want := [][]byte{bytes.Join(free, nil), mem[16:32]}
		first, second := iov(free...), iov(inOne...)
		r.Writev(near, first, 0)
		r.WriteFixed(near, mem[16:32], 0, 1)
		if vectored {
			r.WritevFixed(near, second, 1, 2)
			want = append(want, bytes.Join(inOne, nil))
		}
		submit(t, r)
		for i, w := range want {
			c, ok := r.Next()
			if !ok || c.Data != uint64(i) || c.Errno() != 0 || c.N() != len(w) || c.More() || c.Notif() {
				t.Fatalf("round %d, write %d: %+v, %v", round, i, c, ok)
			}
			if n, err := unix.Read(far, got); err != nil || !bytes.Equal(got[:n], w) {
				t.Fatalf("round %d, write %d: %d bytes, %v, want %d", round, i, n, err, len(w))
			}
		}
	}
}

func TestWriteErrors(t *testing.T) {
	r := newRing(t, 4, 16)
	mem := anonymous(t, 1<<14)
	if err := r.SetBuffers([][]byte{mem[:4096], mem[8192:]}); err != nil {
		t.Fatal(err)
	}
	near, _ := seqpacket(t)
	one := []unix.Iovec{{Base: &mem[4000], Len: 97}} // a byte behind buffer 0
	for _, c := range []struct {
		name  string
		queue func() bool
		want  []unix.Errno
	}{
		{"no descriptor", func() bool { return r.Writev(-1, one, 5) }, []unix.Errno{unix.EBADF}},
		{"outside the buffer", func() bool { return r.WriteFixed(near, mem[4000:4097], 0, 5) }, []unix.Errno{unix.EFAULT}},
		{"another buffer", func() bool { return r.WriteFixed(near, mem[:10], 1, 5) }, []unix.Errno{unix.EFAULT}},
		{"no such buffer", func() bool { return r.WriteFixed(near, mem[:10], 2, 5) }, []unix.Errno{unix.EFAULT}},
		{"vector outside", func() bool { return r.WritevFixed(near, one, 0, 5) }, []unix.Errno{unix.EFAULT, unix.EINVAL}},
	} {
		c.queue()
		submit(t, r)
		if got := r.wait(t); got.Data != 5 || got.N() != 0 || (got.Errno() != c.want[0] && got.Errno() != c.want[len(c.want)-1]) {
			t.Errorf("%s: %v, want %v", c.name, got.Errno(), c.want)
		}
	}
	// A descriptor without room.
	for n := 0; ; n++ {
		r.Writev(near, one, 6)
		submit(t, r)
		c := r.wait(t)
		if c.Errno() == unix.EAGAIN {
			break
		}
		if c.N() != 97 || n > 100_000 {
			t.Fatalf("write %d: %+v", n, c)
		}
	}
}

// TestSetBuffers: buffers can be replaced and taken away at any time, and memory that cannot be registered is an error that leaves none.
func TestSetBuffers(t *testing.T) {
	r := newRing(t, 4, 16)
	mem := anonymous(t, 1<<16)
	near, far := seqpacket(t)
	try := func(b []byte, buffer int) unix.Errno {
		r.WriteFixed(near, b, buffer, 1)
		submit(t, r)
		c := r.wait(t)
		if c.Errno() == 0 {
			if n, err := unix.Read(far, make([]byte, 100)); n != len(b) || err != nil {
				t.Errorf("%d bytes arrived, %v", n, err)
			}
		}
		return c.Errno()
	}
	set := func(bufs ...[]byte) {
		t.Helper()
		if err := r.SetBuffers(bufs); err != nil {
			t.Fatal(err)
		}
	}
	if errno := try(mem[:10], 0); errno != unix.EFAULT {
		t.Errorf("nothing is registered: %v", errno)
	}
	set(mem[:4096])
	set(mem[4096:8192], mem[:4096])
	if errno := try(mem[:10], 1); errno != 0 {
		t.Errorf("registered in the second turn: %v", errno)
	}
	set()
	if errno := try(mem[:10], 1); errno != unix.EFAULT {
		t.Errorf("taken away: %v", errno)
	}
	set(mem)
	hole := anonymous(t, 1<<14)
	if err := unix.Mprotect(hole[4096:8192], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	if err := r.SetBuffers([][]byte{mem, hole}); !errors.Is(err, unix.EFAULT) {
		t.Errorf("memory with a hole: %v", err)
	}
	if errno := try(mem[:10], 0); errno != unix.EFAULT {
		t.Errorf("after an error something is registered: %v", errno)
	}
	set(mem)
}

// TestFixedSendIsStale is why memory that can lose pages must not be registered: a page that a hole is punched under keeps being sent as it was,
// while a send that is not from a registered buffer finds the new page.
func TestFixedSendIsStale(t *testing.T) {
	r := newRing(t, 4, 16)
	if !r.VectoredFixed() {
		require.Skip(t, "uring", "the kernel takes no vector in a registered buffer (Linux 6.15)")
	}
	file, err := unix.MemfdCreate("stale", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(file)
	size := os.Getpagesize()
	if err := unix.Ftruncate(file, int64(size)); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(file, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	copy(mem, "the old page")
	if err := r.SetBuffers([][]byte{mem}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(file, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, int64(size)); err != nil {
		t.Fatal(err)
	}
	copy(mem, "the new page")
	fd, to := socket(t)
	var m sys.Msgs
	m.Begin(&to)
	m.Add(mem[:4])
	m.Add(mem[4:12])
	in := sys.NewInbox(1, 100)
	for want, queue := range map[string]func() bool{
		"the new page": func() bool { return r.SendmsgZC(fd, m.Header(0), 1) },
		"the old page": func() bool { return r.SendmsgZCFixed(fd, m.Header(0), 0, 1) },
	} {
		queue()
		submit(t, r)
		if n, errno := in.Recv(fd); n != 1 || errno != 0 {
			t.Fatalf("%d datagrams, %v", n, errno)
		}
		if b, _ := in.Datagram(0); string(b) != want {
			t.Errorf("sent %q, want %q", b, want)
		}
		for range 2 {
			if c := r.wait(t); c.Errno() != 0 {
				t.Error(c.Errno())
			}
		}
	}
}
