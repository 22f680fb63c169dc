"""TEMPORARY placeholder, to be replaced by the real package."""
import torch
from types import SimpleNamespace as N
def open_data(name, root="", **k):
    from sklearn.datasets import load_digits
    d=load_digits(); x=torch.from_numpy(d.images).float()[:,None]*255/16
    x=torch.nn.functional.interpolate(x,size=32,mode="bilinear").round().to(torch.uint8).expand(-1,3,-1,-1).contiguous(); y=torch.from_numpy(d.target)
    i=torch.arange(len(y)); te=i%5==4
    class S:
        def __init__(s,x,y): s.x,s.labels=x,y
        def __len__(s): return len(s.x)
    return N(train=S(x[~te],y[~te]),test=S(x[te],y[te]),classes=tuple("0123456789"),image_shape=(3,32,32),mean=(.3,)*3,std=(.37,)*3,name=name)
class ImageStream:
    def __init__(s,data,batch_size,seed,device,drop_last=False):
        s.d,s.b,s.seed,s.dl=data,batch_size,seed,drop_last
        n=len(data.train); s.train_batch_count=n//batch_size if drop_last else -(-n//batch_size); s.test_batch_count=-(-len(data.test)//batch_size)
    def train_batches(s,epoch,start_batch=0):
        g=torch.Generator().manual_seed(s.seed*1000+epoch); p=torch.randperm(len(s.d.train),generator=g)
        for i in range(s.train_batch_count):
            j=p[i*s.b:(i+1)*s.b]; x=s.d.train.x[j]
            dx,dy=torch.randint(-2,3,(2,),generator=g).tolist()
            yield torch.roll(x,(dx,dy),(2,3)),s.d.train.labels[j]
    def test_batches(s):
        for i in range(s.test_batch_count): yield s.d.test.x[i*s.b:(i+1)*s.b],s.d.test.labels[i*s.b:(i+1)*s.b]
